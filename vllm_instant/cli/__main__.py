"""``python -m vllm_instant.cli``."""

from vllm_instant.cli import app

app()
