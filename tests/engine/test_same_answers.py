"""A fixed part of ``benchmarks/same_answers.py``: all request options on servers with many flags, beside vLLM.

What each option does on a server without flags is in ``test_default_drafter``.
"""

import pytest
from feature_answers import answers, difference
from request_features import pairs_of_features, single_features
from server_flags import prepare, row_of, serve

DRAFTS = 8
ROW = row_of(
    "adapters: lora",
    "prefix cache: xxhash",
    "prefill: 16 tokens",
    "places: three",
    "order: priority",
    "blocks: 16",
    "log-probabilities: processed",
    "generation: seed",
    "embeddings: prompts",
    "grammars: guidance",
    "tools: hermes",
    "reasoning: granite",
    "template: file",
    "output: usage",
    "logs: request metrics",
    "server: request ids",
    "batching: similarity",
    "streaming: resumable",
)


@pytest.fixture(scope="module")
def paths(demo_pair, tmp_path_factory):
    return prepare(tmp_path_factory.mktemp("flags"), demo_pair.draft)


@pytest.mark.perf
def test_a_server_with_many_flags_answers_as_vllm_does_with_them(paths):
    features = [*single_features(), *pairs_of_features()[::6]]
    with serve(ROW, False, paths) as server:
        theirs = answers(server.url, features)
    assert sum(one["status"] == 200 for one in theirs.values()) > 0.9 * len(features)
    with serve(ROW, True, paths) as server:
        for drafts in (None, DRAFTS):
            ours = answers(server.url, features, drafts)
            assert {name: found for name in ours if (found := difference(ours[name], theirs[name]))} == {}
        metrics = server.metrics()
    assert metrics["vllm_instant:draft_tokens_proposed_total"] > 0
    assert "vllm_instant:plugin_failures_total" not in metrics
