"""`vllm-instant bench` against real servers: what only a real server can show."""

import json

import pytest
from deployments import TOKEN_BY_TOKEN
from typer.testing import CliRunner

from vllm_instant.tools.cli import app

pytestmark = pytest.mark.engine


@pytest.mark.nightly
def test_a_drafting_server_beside_the_baseline(baseline, launch, tmp_path):
    """Every row is measured; which server is faster depends on the machine's load and is not asserted."""
    output = tmp_path / "bench"
    with launch(TOKEN_BY_TOKEN) as ours:
        urls = ["--baseline", baseline.url, "--ours", ours.url, "--output", str(output)]
        words = ["--short", "--concurrency", "2", "--rounds", "3"]
        result = CliRunner().invoke(app, ["bench", *urls, *words])
    assert result.exit_code == 0, result.output
    record = json.loads(output.with_suffix(".json").read_text())
    rows = {row["name"]: row for row in record["rows"]}
    assert rows["acceptance length, code"]["values"]["vLLM"]["mean"] == 1
    assert rows["acceptance length, code"]["values"]["ours"]["mean"] > 1
    # It includes the draft model's cache.
    bytes_per_token = rows["KV-cache bytes per token"]["values"]
    assert bytes_per_token["ours"]["mean"] > bytes_per_token["vLLM"]["mean"] == bytes_per_token["vLLM again"]["mean"]
    assert rows["output tokens/s"]["values"]["ours"]["mean"] > 0
    assert rows["latency of a 100-token response"]["missing"] == ""
    # Float32 and lossless: the same greedy answers, and the same distribution on held-out text.
    assert rows["greedy answers equal to vLLM's"]["values"]["ours"]["mean"] == 1
    assert rows["KL divergence from vLLM"]["values"]["ours"]["mean"] == pytest.approx(0, abs=1e-4)
    assert rows["KL divergence from vLLM"]["contrasts"]["ours"]["verdict"] == "same"
    assert record["arms"]["ours"]["version"].startswith("0.")
    assert "Output tokens/s, 2 at a time" in output.with_suffix(".html").read_text()
