"""``python -m vllm_instant.tools.cli``."""

from vllm_instant.tools.cli import app

app()
