"""Rejection samplers in a real server: seeds, log-probabilities, penalties, masks and grammars beside drafts.

Draft lengths change with every step and request (the test policy ``cycling``), as a real policy's do with the load.
"""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
from asking import ask
from deployments import DRAFT_MODEL
from typer.testing import CliRunner

from vllm_instant.tools.cli import app
from vllm_instant.tools.measure import quality
from vllm_instant.tools.measure.sampling import ServerClient

SAMPLING = {
    "plain": {"temperature": 1.0},
    "top_p": {"temperature": 0.7, "top_p": 0.9},
    "top_k": {"temperature": 1.2, "top_k": 20},
    "penalties": {"temperature": 0.9, "presence_penalty": 0.8, "frequency_penalty": 0.4, "repetition_penalty": 1.2},
    "bad_words": {"temperature": 1.0, "bad_words": [" the", "self"]},
    "min_tokens": {"temperature": 1.0, "min_tokens": 8, "ignore_eos": False},
}
PROMPTS_EACH = 4


@pytest.fixture(scope="module")
def server(launch):
    with launch(DRAFT_MODEL) as running:
        yield running


def _proposed(server):
    return server.metrics()["vllm:spec_decode_num_draft_tokens_total"]


def _seeded(where, prompts, length=400):
    """Send all sampling modes at once, so that they share batches."""
    asked = [(prompt, seed, p) for p in SAMPLING.values() for seed, prompt in enumerate(prompts[:PROMPTS_EACH])]
    with ThreadPoolExecutor(8) as pool:
        answers = pool.map(lambda a: ask(where, a[0][:length], seed=a[1], **a[2])[0]["text"], asked)
        return dict(zip([(name, seed) for name in SAMPLING for seed in range(PROMPTS_EACH)], answers, strict=True))


@pytest.fixture(scope="module")
def seeded_by_baseline(baseline, prompts):
    return _seeded(baseline, prompts)


def test_a_seed_gives_the_answer_that_it_gives_without_speculation(server, seeded_by_baseline, prompts):
    """Identical texts, with drafts of varying length."""
    before = _proposed(server)
    assert _seeded(server, prompts) == seeded_by_baseline
    assert _proposed(server) > before


@pytest.mark.nightly
def test_verify_agrees(server, baseline, tmp_path):
    file = tmp_path / "report.json"
    words = ["--stock", baseline.url, "--ours", server.url, "--draws", "100", "--tokens", "3", "--json", str(file)]
    result = CliRunner().invoke(app, ["verify", *words])
    assert result.exit_code == 0, result.output
    assert {check["outcome"] for check in json.loads(file.read_text())[0]["checks"]} == {"pass"}


def test_the_quality_report_reads_real_log_probabilities(server, baseline, prompts):
    arms = [ServerClient(where.url, "demo") for where in (server, baseline)]
    found = quality.quality_report(*arms, prompts[:4], prompts[4:8], tokens=12)
    assert found.tokens > 100
    assert 1 < found.stock_perplexity < 10_000
    assert found.perplexity_ratio.mean == pytest.approx(1, abs=1e-3)
    assert 0 <= found.divergence.mean < 1e-3
    assert found.answers == 4


def test_requests_side_by_side_keep_their_seeds(server, baseline, prompts):
    """Seeded, unseeded and greedy requests in one batch."""

    def parameters(number):
        return ({"temperature": 1.0, "seed": number}, {"temperature": 1.0}, {"temperature": 0})[number % 3]

    def texts(where):
        with ThreadPoolExecutor(6) as pool:
            jobs = [pool.submit(ask, where, prompts[number][:300], **parameters(number)) for number in range(12)]
            return [job.result()[0]["text"] for job in jobs]

    ours, again, theirs = texts(server), texts(server), texts(baseline)
    for number in range(12):
        if number % 3 != 1:
            assert ours[number] == again[number] == theirs[number]
    assert any(ours[number] != again[number] for number in range(1, 12, 3))


def test_log_probabilities_are_those_of_the_tokens(server, baseline, prompts):
    request = {"temperature": 1.0, "seed": 5, "logprobs": 3, "return_token_ids": True}
    ours, theirs = (ask(where, prompts[3][:300], **request)[0] for where in (server, baseline))
    assert ours["token_ids"] == theirs["token_ids"]
    assert ours["logprobs"]["tokens"] == theirs["logprobs"]["tokens"]
    assert ours["logprobs"]["token_logprobs"] == pytest.approx(theirs["logprobs"]["token_logprobs"], abs=1e-3)
    unseeded = ask(server, prompts[3][:300], temperature=1.0, logprobs=2)[0]["logprobs"]
    assert len(unseeded["token_logprobs"]) == 48
    assert all(value <= 0 for value in unseeded["token_logprobs"])


def test_masks_apply_to_drafts_and_to_the_tokens_after_them(server, prompts):
    allowed = [40, 41, 42, 43, 44, 300, 301]
    choice = ask(server, prompts[0][:200], temperature=1.0, allowed_token_ids=allowed, return_token_ids=True)[0]
    assert set(choice["token_ids"]) <= set(allowed)


def test_structured_output_keeps_its_grammar(server, prompts):
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    for seed in (None, 1):
        text = ask(
            server,
            prompts[1][:100],
            temperature=1.0,
            seed=seed,
            max_tokens=60,
            ignore_eos=False,
            structured_outputs={"json": schema, "whitespace_pattern": " ?"},
        )[0]["text"]
        if text.rstrip().endswith("}"):
            assert isinstance(json.loads(text)["a"], int)
        else:
            assert text.lstrip().startswith("{")
