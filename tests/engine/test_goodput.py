"""The default policy on a real server: answers, decision log, request parameters, a skipped draft model."""

import json
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from asking import COMMON, NAMED, ask_all
from deployments import BURSTS, GOODPUT

COSTS = """
[speculation]
costs_folder = "{folder}"
log_decisions = true
"""
CLI = Path(sys.executable).parent / "vllm-instant"


def _complete(server, prompt, **parameters):
    body = {"model": "demo", "prompt": prompt, "max_tokens": 64, "temperature": 0, "ignore_eos": True, **parameters}
    return httpx.post(f"{server.url}/v1/completions", json=body, timeout=300)


def _counts(response):
    """Number of proposed and of accepted draft tokens in a response's metrics."""
    metrics = response.json()["metrics"]["speculative_decoding"]
    return metrics["num_draft_tokens"], metrics["num_accepted_draft_tokens"]


@pytest.fixture(scope="module")
def costs(tmp_path_factory):
    return tmp_path_factory.mktemp("costs")


@pytest.fixture(scope="module")
def server(launch, costs):
    with launch(GOODPUT + COSTS.format(folder=costs)) as running:
        yield running


def test_fifty_prompts_are_answered_as_by_the_baseline(server, prompts, expected):
    assert ask_all(server, prompts) == expected
    assert server.metrics()["vllm:spec_decode_num_draft_tokens_total"] > 10


def test_decisions_can_be_read(server):
    response = _complete(server, "def main():")
    request_id = response.json()["id"]
    answer = httpx.get(f"{server.url}/v1/instant/decisions", params={"last": 30}).json()
    [engine] = answer["engines"]
    assert len(engine["decisions"]) == 30
    of_request = httpx.get(f"{server.url}/v1/instant/decisions", params={"last": 30, "request_id": request_id}).json()[
        "engines"
    ][0]["decisions"]
    assert of_request
    assert all(row["request"].startswith(request_id) for d in of_request for row in d["requests"])
    assert httpx.get(f"{server.url}/v1/instant/decisions", params={"last": 0}).status_code in (400, 422)
    shown = subprocess.run(
        [CLI, "explain", "--url", server.url, "--request", request_id], capture_output=True, text=True, timeout=60
    )
    assert shown.returncode == 0, shown.stderr
    assert "its acceptance" in shown.stdout
    assert len(shown.stdout.splitlines()) > 20
    raw = subprocess.run(
        [CLI, "explain", "--url", server.url, "--last", "3", "--json"], capture_output=True, text=True, timeout=60
    )
    assert len(json.loads(raw.stdout)["engines"][0]["decisions"]) == 3


@pytest.mark.parametrize(("setting", "maximum"), [("off", 0), (2, 2)])
def test_a_client_sets_the_draft_length_of_its_request(server, setting, maximum):
    response = _complete(server, "class Cache:", vllm_xargs={"instant_speculation": setting})
    proposed, accepted = _counts(response)
    steps = 64 - accepted
    assert (proposed == 0) == (maximum == 0)
    assert proposed <= maximum * steps
    if maximum:
        assert proposed >= maximum * (steps - 3)


@pytest.mark.parametrize(
    ("parameters", "sentence"),
    [
        ({"instant_speculation": "sometimes"}, 'must be "off", "auto" or a whole number from 0, found'),
        ({"instant_output_tokens": "few"}, "instant_output_tokens must be a number of tokens from 1, found"),
    ],
    ids=lambda value: next(iter(value), ""),
)
def test_a_wrong_parameter_is_refused_in_one_sentence(server, parameters, sentence):
    response = _complete(server, "class Cache:", vllm_xargs=parameters)
    assert response.status_code == 400
    assert sentence in response.json()["error"]["message"]


def test_changes_are_logged(server):
    assert "drafting begins" in server.log_text()


@pytest.mark.nightly
def test_learned_costs_are_saved_when_the_server_stops(launch, tmp_path):
    with launch(GOODPUT + COSTS.format(folder=tmp_path)) as server:
        _complete(server, "def main():")
        _complete(server, "def main():")
    [file] = tmp_path.glob("*.json")
    stored = json.loads(file.read_text())
    assert stored["identity"]["dtype"] == "float32"
    assert stored["costs"]["observations"] >= 20


@pytest.mark.nightly
def test_a_skipped_draft_model_catches_up_and_drafts_as_well_as_before(launch, prompts):
    """Drafts depend on the context alone, provided that the draft model has processed all of it."""
    with launch(BURSTS) as server:
        shares = []
        for extra in ({}, {"bursts": 1}):
            counts = [
                _counts(_complete(server, prompt, max_tokens=120, vllm_xargs=extra or None)) for prompt in prompts[:12]
            ]
            proposed, accepted = (sum(c) for c in zip(*counts, strict=True))
            shares.append((proposed, accepted / proposed))
        (always, share), (in_bursts, share_in_bursts) = shares
        assert 60 < in_bursts < always / 6
        assert share_in_bursts > share - 0.12


@pytest.mark.nightly
def test_calibrate_learns_costs_before_the_server_starts(demo_pair, tmp_path):
    file = tmp_path / "deploy.toml"
    file.write_text(GOODPUT.replace("DRAFT", str(demo_pair.draft)) + COSTS.format(folder=tmp_path / "costs"))
    command = [CLI, "calibrate", str(demo_pair.target), "--instant-config", str(file), "--most", "2", "--seconds", "2"]
    done = subprocess.run([*command, *COMMON, *NAMED], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    [learned] = (tmp_path / "costs").glob("*.json")
    assert json.loads(learned.read_text())["costs"]["observations"] > 50
    assert "Learned from" in done.stdout
