"""`vllm-instant bench` against real servers: what only they can say."""

import json

import pytest
from deployments import TOKEN_BY_TOKEN
from typer.testing import CliRunner

from vllm_instant.tools.cli import app

pytestmark = pytest.mark.engine


def test_a_drafting_server_beside_stock(stock, launch, tmp_path):
    """Not whether it is faster, which a busy machine would decide, but that every row is measured."""
    output = tmp_path / "bench"
    with launch(TOKEN_BY_TOKEN) as ours:
        urls = ["--stock", stock.url, "--ours", ours.url, "--output", str(output)]
        words = ["--short", "--concurrency", "2", "--rounds", "3"]
        result = CliRunner().invoke(app, ["bench", *urls, *words])
    assert result.exit_code == 0, result.output
    record = json.loads(output.with_suffix(".json").read_text())
    rows = {row["name"]: row for row in record["rows"]}
    assert rows["acceptance length, code"]["values"]["stock"]["mean"] == 1
    assert rows["acceptance length, code"]["values"]["ours"]["mean"] > 1
    # The draft model's cache is in it.
    bytes_per_token = rows["KV-cache bytes per token"]["values"]
    assert bytes_per_token["ours"]["mean"] > bytes_per_token["stock"]["mean"] == bytes_per_token["stock again"]["mean"]
    assert rows["output tokens/s"]["values"]["ours"]["mean"] > 0
    assert rows["latency of a 100-token response"]["missing"] == ""
    # Float32 and lossless: the same greedy answers, and the same distribution on held-out text.
    assert rows["greedy answers equal to stock's"]["values"]["ours"]["mean"] == 1
    assert rows["KL divergence from stock"]["values"]["ours"]["mean"] == pytest.approx(0, abs=1e-4)
    assert rows["KL divergence from stock"]["contrasts"]["ours"]["verdict"] == "no difference"
    assert record["arms"]["ours"]["version"].startswith("0.")
    assert "Output tokens/s, 2 at a time" in output.with_suffix(".html").read_text()
