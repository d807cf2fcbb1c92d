"""Repairs and short cuts for vLLM's CPU build."""
