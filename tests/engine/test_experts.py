"""A mixture of experts in real servers: native routing, fewer experts, the quality gate, and a trace."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from asking import COMMON, NAMED, ask

from vllm_instant.moe.expert_groups import SuperExperts
from vllm_instant.moe.routing_trace import RoutedModel, Trace
from vllm_instant.tools.demo import moe_assets, widen_experts
from vllm_instant.tools.measure.prompts import snippets
from vllm_instant.tools.measure.servers import Server, running
from vllm_instant.tools.moe.tracing import record

ROUTE = "/v1/instant/experts"
LAYERS, EXPERTS, TOP_K = 6, 64, 8

SUPER_EXPERT = """
[speculation]
plugin = "off"

[experts]
plugin = "super_expert"
budget = 1.0
keep = 0
max_kl = 0.01
clusters = "CLUSTERS"
adjustable = true
"""

OBSERVED = """
[speculation]
plugin = "cycling"

[drafter]
plugin = "ngram"
num_speculative_tokens = 3

[experts]
plugin = "observed"
trace = "TRACE"
tokens = 6000
prefill_share = 0.2
adjustable = true
"""


@pytest.fixture(scope="module")
def trace_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("trace") / "experts.npz"


@pytest.fixture(scope="module")
def clusters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An arbitrary file: in each layer it keeps the same quarter of the experts for every token."""
    generator = np.random.default_rng(0)
    prior = [generator.permutation([1e6] * 16 + [1e-6] * 48).tolist() for _ in range(LAYERS)]
    model = RoutedModel("planted", LAYERS, EXPERTS, TOP_K)
    path = tmp_path_factory.mktemp("clusters") / "clusters.json"
    SuperExperts(model, ((0,) * EXPERTS,) * LAYERS, tuple(map(tuple, prior))).write(path)
    return path


@pytest.fixture(scope="module")
def servers(
    trace_file: Path, clusters: Path, plugin_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Server]]:
    """The baseline, ours with super_expert, and ours with observed; started together."""
    model = moe_assets.prepare(size=widen_experts.SMALL, dtype="float32")
    folder = tmp_path_factory.mktemp("moe")

    def server(name: str, deployment: str | None) -> Server:
        words = [*COMMON, *NAMED]
        if deployment is not None:
            file = folder / f"{name}.toml"
            file.write_text(deployment.replace("CLUSTERS", str(clusters)).replace("TRACE", str(trace_file)))
            words += ["--plugins", "vllm_instant", "--instant-config", str(file)]
        path = [str(plugin_folder), *filter(None, os.environ.get("PYTHONPATH", "").split(":"))]
        return Server(model, words, log=folder / f"{name}.log", environment={"PYTHONPATH": ":".join(path)})

    found = {
        "baseline": server("baseline", None),
        "super_expert": server("super_expert", SUPER_EXPERT),
        "observed": server("observed", OBSERVED),
    }
    with running(*found.values()):
        yield found


@pytest.fixture(scope="module")
def texts(prompts: list[str]) -> list[str]:
    return [prompt[:300] for prompt in prompts[:8]]


def _control(server: Server, **settings: Any) -> dict[str, Any]:
    answer = httpx.post(f"{server.url}{ROUTE}", json=settings, timeout=60)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def _batch(server: Server, texts: list[str], tokens: int = 40) -> list[str]:
    """Complete all texts in one batch."""
    return [choice["text"] for choice in ask(server, texts, max_tokens=tokens)]  # type: ignore[arg-type]


def test_native_routing_gives_the_baselines_answers(servers: dict[str, Server], texts: list[str]) -> None:
    expected = [ask(servers["baseline"], text)[0]["text"] for text in texts[:3]] + _batch(servers["baseline"], texts)
    for name in ("super_expert", "observed"):
        found = [ask(servers[name], text)[0]["text"] for text in texts[:3]] + _batch(servers[name], texts)
        assert found == expected, name


def test_a_budget_means_fewer_distinct_experts_and_the_gate_leaves_bad_clusters(
    servers: dict[str, Server], texts: list[str]
) -> None:
    server = servers["super_expert"]
    _control(server, budget=0.25)
    # The first divergences are measured every few steps; one batch may end before the gate has enough of them.
    for _ in range(4):
        _batch(server, texts, 200)
        log = server.log_text()
        if steps := [int(step) for step in re.findall(r"super_expert loosened its budget .* at step (\d+)", log)]:
            break
    else:
        pytest.fail(log[-2000:])
    measures = _control(server)["measures"]
    assert measures["budget"] > 0.25
    assert steps[-1] - steps[0] < 200
    # A level whose divergence is near the limit needs more measurements before the gate decides.
    for _ in range(4):
        if "the model's own routing" in server.log_text() or _control(server)["measures"]["kl"] < 0.02:
            break
        _batch(server, texts, 200)
    else:
        pytest.fail(server.log_text()[-2000:])


def test_metrics_and_rejected_settings(servers: dict[str, Server], texts: list[str]) -> None:
    server = servers["super_expert"]
    described = _control(server, forget=True)
    assert [layer["layer"] for layer in described["layers"]] == [
        f"model.layers.{i}.block_sparse_moe.experts" for i in range(LAYERS)
    ]
    _control(server, budget=0.3, shadow_every=0)
    _batch(server, texts, 30)
    totals = _control(server)["totals"]
    assert totals["routed_experts"] < 0.9 * totals["native_experts"]
    assert totals["routed_mass"] < totals["native_mass"]
    metrics = server.metrics()
    assert metrics["vllm_instant:expert_layer_steps_counted_total"] > 0
    assert metrics["vllm_instant:experts_routed_total"] < metrics["vllm_instant:experts_native_total"]
    shown = httpx.get(f"{server.url}{ROUTE}", timeout=30).json()["engines"][0]
    assert shown["failures"] == []
    for wrong in ({"budget": 2}, {"budgets": 0.5}, {"shadow_every": -1}):
        answer = httpx.post(f"{server.url}{ROUTE}", json=wrong, timeout=30)
        assert answer.status_code == 400
        assert "found" in json.dumps(answer.json())


def test_a_trace_under_speculation_is_readable(servers: dict[str, Server], trace_file: Path) -> None:
    server = servers["observed"]
    texts = [*snippets("code", 0.0, 12, 0), *snippets("structured", 0.0, 12, 0)]
    # Until all texts are sent; the trace also holds the requests of other tests.
    path, tokens = record(server.url, "demo", texts, 6000, concurrency=6, output_tokens=24)
    assert path == trace_file
    trace = Trace.read(trace_file)
    assert len(trace) == tokens > 500
    assert trace.model.shape() == RoutedModel("", LAYERS, EXPERTS, TOP_K).shape()
    assert {"code", "structured"} <= set(trace.classes)
    assert trace.is_prefill.any()
    assert not trace.is_prefill.all()
    # The model's weights sum to one, and no token picks an expert twice.
    np.testing.assert_allclose(trace.weights.astype(float).sum(-1), 1.0, atol=5e-3)
    assert (np.sort(trace.experts, -1)[..., 1:] != np.sort(trace.experts, -1)[..., :-1]).all()
    assert server.metrics()["vllm_instant:draft_tokens_proposed_total"] > 0
