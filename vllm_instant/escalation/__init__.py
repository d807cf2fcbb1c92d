"""Answers each request here or by a deeper server, as a plugin decides. Knows nothing of vLLM."""
