"""Sampled answers follow the model's distribution, which on the CPU needs a repair of vLLM's expand kernel.

The exact joint distribution of three tokens (top-k 3, so 27 outcomes) comes from transformers; thousands of sampled
completions are compared with it. A wrong sampler is far off: without the repairs the temperature of draft tokens is
uninitialised memory, and top-k without top-p kills the engine.
"""

import json
from collections import Counter
from importlib import import_module
from itertools import product

import pytest
from asking import COMMON, NAMED, EngineDiedError, ask
from deployments import DRAFT_MODEL
from scipy.stats import chisquare

from vllm_instant.patches.cpu import sampling
from vllm_instant.tools.measure.servers import Server

PROMPT = "import os\nimport sys\n\ndef main("
TOP_K, TEMPERATURE, TOKENS = 3, 0.8, 3
REQUESTS, COMPLETIONS = 40, 50
SIGNIFICANCE = 1e-6


@pytest.fixture(scope="module")
def exact(demo_pair):
    """Probability of every sequence of three tokens."""
    import torch
    from transformers import AutoTokenizer, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(demo_pair.target)
    model = LlamaForCausalLM.from_pretrained(demo_pair.target, dtype=torch.float32).eval()
    prompt = tokenizer(PROMPT)["input_ids"]

    def following(tokens):
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([[*prompt, *tokens]])).logits[0, -1] / TEMPERATURE
        values, indices = logits.topk(TOP_K)
        return dict(zip(indices.tolist(), values.softmax(-1).tolist(), strict=True))

    joint = {(): 1.0}
    for _ in range(TOKENS):
        joint = {(*tokens, t): p * q for tokens, p in joint.items() for t, q in following(tokens).items()}
    assert len(joint) == TOP_K**TOKENS
    return joint


def _p_value(server, exact):
    counts = Counter()
    # Without seeds: seeded requests bypass the rejection sampler.
    for _ in range(REQUESTS):
        choices = ask(
            server,
            PROMPT,
            n=COMPLETIONS,
            temperature=TEMPERATURE,
            top_k=TOP_K,
            max_tokens=TOKENS + 1,
            return_token_ids=True,
        )
        counts.update(tuple(choice["token_ids"][:TOKENS]) for choice in choices)
    total = sum(counts.values())
    assert total == REQUESTS * COMPLETIONS
    if set(counts) - set(exact):
        return 0.0  # tokens that top-k excludes
    # Rare outcomes are pooled, as the chi-square approximation requires.
    common = [
        outcome
        for outcome in product(*[{t[i] for t in exact} for i in range(TOKENS)])
        if exact.get(outcome, 0) * total >= 8
    ]
    observed = [counts[outcome] for outcome in common]
    wanted = [exact[outcome] * total for outcome in common]
    if total - sum(wanted) > 8:
        observed.append(total - sum(observed))
        wanted.append(total - sum(wanted))
    scale = sum(observed) / sum(wanted)
    return float(chisquare(observed, [w * scale for w in wanted]).pvalue)


@pytest.mark.nightly
def test_our_server_samples_the_models_distribution(launch, exact):
    with launch(DRAFT_MODEL) as server:
        assert _p_value(server, exact) > SIGNIFICANCE
        before = server.metrics()["vllm:spec_decode_num_draft_tokens_total"]
        assert before > 0, "without drafts this would test nothing"


@pytest.mark.nightly
def test_vllms_own_speculation_is_wrong_exactly_where_the_probes_detect_it(demo_pair, exact, tmp_path):
    speculation = {"method": "draft_model", "model": str(demo_pair.draft), "num_speculative_tokens": 5}
    words = [
        *COMMON,
        *NAMED,
        "--speculative-config",
        json.dumps({**speculation, "draft_sample_method": "probabilistic"}),
    ]
    with Server(demo_pair.target, words, log=tmp_path / "server.log") as server:
        try:
            wrong = _p_value(server, exact) < SIGNIFICANCE
        except EngineDiedError:
            wrong = True
    assert wrong == any(
        repair.is_wrong(getattr(import_module(repair.module), repair.function)) for repair in sampling.REPAIRS
    )
