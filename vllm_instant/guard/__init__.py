"""Withholds text until a guard plugin has judged it: a bounded delay and a bounded leak. Knows nothing of vLLM."""
