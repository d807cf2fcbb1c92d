"""Speculation without vLLM: the draft budgets of a step, the plan for the workers, and verification."""
