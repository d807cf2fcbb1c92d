"""Serving mixture-of-experts models without vLLM: router scoring, expert groups and routing traces."""
