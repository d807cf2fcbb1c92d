"""The rejection samplers: how long verification takes in a step, and how many of the same drafts they accept.

    .venv/bin/python benchmarks/samplers.py time [--rounds 25]
    .venv/bin/python benchmarks/samplers.py acceptance [--places 3000]
    .venv/bin/python benchmarks/samplers.py frontier [--places 400]
    .venv/bin/python benchmarks/samplers.py served [--only cascade]

``time``: batch 16 with 8 draft tokens each, temperature 1, drafts sampled from a distribution like a fair draft
model's, on the CPU. Everything that vLLM's model runner calls is timed: copies of logits, temperature, top-p if asked
for, the verification and the token after it. The samplers take turns; ratios are of neighbouring calls.

``acceptance``: at many places of held-out text the demo's draft model samples eight tokens (temperature 1, float32),
and the target verifies them. For each draft and each length the expected number of accepted tokens under ``token`` and
under ``block`` is computed exactly, from the probabilities that the samplers themselves use, so that the only noise is
which drafts were sampled. Intervals are bootstraps over places. Nothing is timed, and there is no engine.

``frontier``: the same for the lossy samplers ``relaxed`` and ``cascade``: expected accepted tokens per step against the
quality of the next token after held-out text, which is exact as well: perplexity under the target of what is served,
Kullback-Leibler divergence of it from the target, and total variation, whose highest value must not exceed the bound.
``more_at_equal_divergence`` and ``more_at_equal_perplexity`` are the differences in accepted tokens from ``relaxed``
with the bound at which it has the same value. Perplexity alone falls where a sampler favours
likely tokens.

``served``: tokens per second of one user at temperature 1, and accepted tokens per step, in a server of each sampler on
the demo's pair, of the target alone and of the draft model alone, one server after the other.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from results import HERE, write
from sampler_harness import drafts_metadata, our_sampler, prepare_cpu_kernels, sampling_metadata, stock_sampler
from transformers import AutoModelForCausalLM, AutoTokenizer

from vllm_instant.speculation.verification import pad_drafts
from vllm_instant.tools.demo import assets, widen_model
from vllm_instant.tools.demo.corpus import documents
from vllm_instant.tools.measure.http_client import get
from vllm_instant.tools.measure.prompts import snippets
from vllm_instant.tools.measure.sampling import ServerClient, complete
from vllm_instant.tools.measure.server_metrics import metric_totals
from vllm_instant.tools.measure.servers import Server, running, settle
from vllm_instant.tools.measure.statistics import median_interval, ratio_interval
from vllm_instant_plugins.samplers import block
from vllm_instant_plugins.samplers.block import BlockSampler
from vllm_instant_plugins.samplers.cascade import CascadeSampler
from vllm_instant_plugins.samplers.relaxed import RelaxedSampler
from vllm_instant_plugins.samplers.residuals import move_towards
from vllm_instant_plugins.samplers.token import TokenSampler, ratios

BATCH, LENGTH = 16, 8
LENGTHS = range(2, 9)
CONTEXT = 96
BOUNDS = (0.02, 0.05, 0.1, 0.2, 0.4)
RELAXED_GRID = (0.0, 0.005, 0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)
"""Bounds of ``relaxed`` between which its accepted tokens are interpolated."""
ALPHAS = {"opt": 0.1, "chow": 0.3, "token": 0.5}
RESAMPLED = 1000
SERVED_TOKENS = 96


def seconds_of(samplers: dict[str, Any], vocabulary: int, top_p: float | None, certain: bool, rounds: int) -> Any:
    """Seconds of each call by sampler, in turns, each round with drafts of its own."""
    seconds: dict[str, list[float]] = {name: [] for name in samplers}
    sampling = sampling_metadata([1.0] * BATCH, None if top_p is None else [top_p] * BATCH)
    for number in range(rounds + 2):
        torch.manual_seed(number)
        logits = 3 * torch.randn(BATCH * (LENGTH + 1), vocabulary)
        metadata = drafts_metadata([[0] * LENGTH] * BATCH)
        rows = logits[metadata.target_logits_indices]
        probs = (rows + torch.randn(rows.shape)).softmax(-1)
        metadata.draft_token_ids = torch.multinomial(probs, 1)[:, 0].to(torch.int32)
        for name, sampler in samplers.items():
            began = time.perf_counter()
            sampler(metadata, None if certain else probs, logits, sampling)
            if number >= 2:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def kept_of(target_probs: torch.Tensor, draft_probs: torch.Tensor, drafts: torch.Tensor) -> tuple[Any, Any]:
    """Expected accepted tokens of each draft under ``token`` and under ``block``; float64 ``[batch]`` each.

    Args:
        target_probs: float32 ``[batch, length, vocabulary]``.
        draft_probs: the same of the draft model.
        drafts: int64 ``[batch, length]``.

    """
    batch, length = drafts.shape
    rows = pad_drafts(drafts.flatten(), [length] * batch)
    target, draft = target_probs.flatten(0, 1).contiguous(), draft_probs.flatten(0, 1).contiguous()
    of_drafts = ratios(rows, target, draft)
    by_token = of_drafts.clamp(max=1).cumprod(1).sum(1)
    probabilities = block.length_chances(rows, block.weights(of_drafts), target, draft)
    # A length is reached when it or a longer one is acceptable.
    reached = 1 - (1 - probabilities).flip(1).cumprod(1).flip(1)
    return by_token, reached.sum(1)


def places(tokenizer: Any, kind: str, count: int) -> torch.Tensor:
    """int64 ``[count, CONTEXT]``: evenly spread over the held-out documents of a kind."""
    text = "\n".join(document.text for document in documents(held_out_only=True) if document.kind == kind)
    stream = torch.tensor(tokenizer(text)["input_ids"])
    starts = torch.linspace(0, len(stream) - CONTEXT - 1, count).long()
    return torch.stack([stream[start : start + CONTEXT] for start in starts])


def drafted(target: Any, draft: Any, tokens: torch.Tensor, length: int, temperature: float) -> tuple[Any, Any, Any]:
    """Both models' probabilities ``[batch, length, vocabulary]`` and the drafts ``[batch, length]``."""
    draft_probs = []
    with torch.inference_mode():
        for _ in range(length):
            draft_probs.append((draft(input_ids=tokens).logits[:, -1].float() / temperature).softmax(-1))
            tokens = torch.cat([tokens, torch.multinomial(draft_probs[-1], 1)], 1)
        target_probs = (target(input_ids=tokens).logits[:, CONTEXT - 1 : -1].float() / temperature).softmax(-1)
    return target_probs, torch.stack(draft_probs, 1), tokens[:, CONTEXT:]


def timed(rounds: int) -> list[dict[str, Any]]:
    """Milliseconds of whole calls by vocabulary, kind of drafts and sampler."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    prepare_cpu_kernels()
    samplers = {
        "vllm": stock_sampler(),
        "token": our_sampler(TokenSampler()),
        "block": our_sampler(BlockSampler()),
        "relaxed": our_sampler(RelaxedSampler(0.1)),
    }
    cells = []
    for vocabulary in (32_000, 150_000):
        for top_p, certain in ((None, False), (None, True), (0.95, False)):
            seconds = seconds_of(samplers, vocabulary, top_p, certain, rounds)
            for name, values in seconds.items():
                cell = {
                    "vocabulary": vocabulary,
                    "drafts": "certain" if certain else "sampled",
                    "top_p": top_p,
                    "sampler": name,
                    "milliseconds": vars(median_interval([1e3 * value for value in values])),
                    "of_vllm": vars(ratio_interval(values, seconds["vllm"])),
                }
                cells.append(cell)
                case = f"{vocabulary:7} {cell['drafts']:8} top_p {top_p}: {name:8}"
                times = f"{cell['milliseconds']['median']:7.1f} ms, {cell['of_vllm']['median']:.2f} of vLLM's"
                print(case, times, flush=True)
    return cells


def demo_models() -> tuple[Any, Any, Any]:
    """The demo's tokenizer, smallest target and draft model, in float32."""
    pair = assets.prepare(size=widen_model.SMALL, dtype="float32")
    target, draft = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval() for path in (pair.target, pair.draft)
    )
    return AutoTokenizer.from_pretrained(pair.target), target, draft


def accepted(count: int, temperature: float = 1.0) -> list[dict[str, Any]]:
    """Expected accepted tokens of both rules by class of text and draft length."""
    torch.manual_seed(0)
    tokenizer, target, draft = demo_models()
    cells = []
    for kind in ("structured", "code"):
        both: dict[int, list[tuple[Any, Any]]] = {length: [] for length in LENGTHS}
        for group in places(tokenizer, kind, count).split(25):
            target_probs, draft_probs, drafts = drafted(target, draft, group, max(LENGTHS), temperature)
            for length in LENGTHS:
                both[length].append(kept_of(target_probs[:, :length], draft_probs[:, :length], drafts[:, :length]))
        for length, parts in both.items():
            token, blocks = (torch.cat(part).numpy() for part in zip(*parts, strict=True))
            picks = np.random.default_rng(0).integers(0, len(token), (4000, len(token)))
            low, high = np.quantile(blocks[picks].mean(1) / token[picks].mean(1), [0.025, 0.975])
            cells.append(
                {
                    "text": kind,
                    "draft_length": length,
                    "temperature": temperature,
                    "drafts": len(token),
                    "kept_by_token": token.mean(),
                    "kept_by_block": blocks.mean(),
                    "gain": {"mean": blocks.mean() / token.mean(), "low": low, "high": high},
                    "tokens_per_step_gain": (1 + blocks.mean()) / (1 + token.mean()),
                }
            )
            print(
                f"{kind:10} length {length}: {token.mean():.3f} -> {blocks.mean():.3f} accepted, "
                f"gain {blocks.mean() / token.mean():.3f} [{low:.3f}, {high:.3f}]",
                flush=True,
            )
    return cells


Bend = Callable[[torch.Tensor, torch.Tensor], None]


def lossy_arms() -> dict[tuple[str, float], Bend]:
    """How each sampler changes the target's distributions, by its name and bound."""
    arms: dict[tuple[str, float], Bend] = {}
    for bound in RELAXED_GRID:
        arms["relaxed", bound] = lambda p, q, bound=bound: move_towards(p, q, bound)
    for rule, alpha in ALPHAS.items():
        for bound in BOUNDS:
            arms[f"cascade, {rule}, alpha {alpha:g}", bound] = CascadeSampler(rule, alpha, bound).bend  # type: ignore[arg-type]
    arms["draft model alone", 1.0] = lambda p, q: p.copy_(q)
    return arms


def frontier(count: int) -> list[dict[str, Any]]:
    """Accepted tokens and quality of the lossy samplers, by class of text."""
    torch.manual_seed(0)
    tokenizer, target, draft = demo_models()
    cells = []
    for kind in ("structured", "code"):
        found: dict[tuple[str, float], list[np.ndarray]] = {}
        for group in places(tokenizer, kind, count).split(25):
            probs = drafted(target, draft, group, LENGTH, 1.0)
            for arm, bend in lossy_arms().items():
                found.setdefault(arm, []).append(of_places(*probs, bend))
        columns = {arm: np.concatenate(parts, 1) for arm, parts in found.items()}
        cells += cells_of(kind, columns)
    return cells


def of_places(target: torch.Tensor, draft: torch.Tensor, drafts: torch.Tensor, bend: Bend) -> np.ndarray:
    """By place: accepted tokens, cross-entropy, divergence and variation of the first token, highest variation.

    Args:
        target: float32 ``[places, length, vocabulary]``.
        draft: the same of the draft model.
        drafts: int64 ``[places, length]``.
        bend: overwrites its first argument with what is served.

    """
    served = target.clone()
    bend(served.flatten(0, 1), draft.flatten(0, 1).contiguous())
    kept = kept_of(served, draft, drafts)[1]
    variation = (served - target).double().abs().sum(-1) / 2
    p, s = target[:, 0].double(), served[:, 0].double()
    log_p = p.clamp_min(1e-45).log()
    entropy = -(s * log_p).sum(-1)
    divergence = torch.where(s > 0, s * (s.clamp_min(1e-45).log() - log_p), 0.0).sum(-1)
    return torch.stack([kept, entropy, divergence, variation[:, 0], variation.amax(1)]).numpy()


def cells_of(kind: str, columns: dict[tuple[str, float], np.ndarray]) -> list[dict[str, Any]]:
    """The means of all arms on one class of text, and what they accept beyond ``relaxed`` at equal quality."""
    count = next(iter(columns.values())).shape[1]
    picks = np.random.default_rng(0).integers(0, count, (RESAMPLED, count))
    # The first row is the sample itself; a row has the weight of each place.
    weights = np.concatenate([np.ones((1, count)), [np.bincount(row, minlength=count) for row in picks]]) / count
    means = {arm: own @ weights.T for arm, own in columns.items()}
    grid = np.stack([means["relaxed", bound] for bound in RELAXED_GRID])
    cells = []
    for (arm, bound), own in columns.items():
        if arm == "relaxed" and bound not in (0.0, *BOUNDS):
            continue
        highest = float(own[4].max())
        if highest > bound + 1e-5:
            raise SystemExit(f"{arm} with bound {bound} has a total variation of {highest}")
        found = means[arm, bound]
        cell = {
            "text": kind,
            "sampler": arm,
            "bound": bound,
            "places": count,
            "accepted": float(found[0, 0]),
            "perplexity": float(np.exp(found[1, 0])),
            "divergence": float(found[2, 0]),
            "variation": float(found[3, 0]),
            "highest_variation": highest,
            "more_at_equal_perplexity": beyond(found, grid, 1),
            "more_at_equal_divergence": beyond(found, grid, 2),
        }
        cells.append(cell)
        gains = [
            f"{name} {gain['mean']:+.2f} [{gain['low']:+.2f}, {gain['high']:+.2f}]"
            for name, gain in (
                ("KL", cell["more_at_equal_divergence"]),
                ("perplexity", cell["more_at_equal_perplexity"]),
            )
        ]
        print(
            f"{kind:10} {arm:24} bound {bound:4}: {cell['accepted']:.3f} of {LENGTH}, perplexity "
            f"{cell['perplexity']:.3f}, KL {cell['divergence']:.4f}, highest variation {highest:.4f}; beyond relaxed "
            f"at equal {', '.join(gains)}",
            flush=True,
        )
    return cells


def beyond(found: np.ndarray, grid: np.ndarray, quality: int) -> dict[str, float]:
    """Accepted tokens beyond those of ``relaxed`` at the same quality, with a bootstrap interval.

    Args:
        found: ``[columns, samples]``; accepted tokens are column 0.
        grid: the same of ``relaxed``, ``[bounds, columns, samples]``.
        quality: the column that is equal.

    """
    samples = range(found.shape[1])
    differences = [found[0, i] - np.interp(found[quality, i], grid[:, quality, i], grid[:, 0, i]) for i in samples]
    low, high = np.quantile(differences[1:], [0.025, 0.975])
    return {"mean": float(differences[0]), "low": float(low), "high": float(high)}


def served_arms(draft: Path) -> dict[tuple[str, float], str]:
    """Deployment files by sampler and bound; an empty one for a model alone."""
    drafting = (
        '[speculation]\nplugin = "fixed"\n[drafter]\nplugin = "model"\nnum_speculative_tokens = 5\n'
        f'draft_sample_method = "probabilistic"\nmodel = {json.dumps(str(draft))}\n[rejection_sampler]\n'
    )
    arms = {("target alone", 0.0): "", ("draft model alone", 1.0): "", ("block", 0.0): f'{drafting}plugin = "block"\n'}
    for bound in BOUNDS:
        arms["relaxed", bound] = f'{drafting}plugin = "relaxed"\nepsilon = {bound}\n'
        for rule in ("opt",):
            settings = f'rule = "{rule}"\nalpha = {ALPHAS[rule]}\nepsilon = {bound}\n'
            arms[f"cascade, {rule}, alpha {ALPHAS[rule]:g}", bound] = f'{drafting}plugin = "cascade"\n{settings}'
    return arms


def served(only: str, requests: int, output: Path) -> None:
    """Tokens per second and accepted tokens of one user, by sampler, one server after the other."""
    pair = assets.prepare()
    prompts = [spec.text for kind in ("structured", "code") for spec in snippets(kind, 1.0, requests // 2, 5)]
    for (arm, bound), deployment in served_arms(pair.draft).items():
        if only not in arm:
            continue
        with tempfile.TemporaryDirectory(prefix="samplers-") as name:
            file = Path(name) / "deploy.toml"
            file.write_text(deployment or '[speculation]\nplugin = "off"\n')
            server = Server(
                pair.draft if arm == "draft model alone" else pair.target,
                [
                    *("--served-model-name", "demo", "--max-model-len", "1024", "--max-num-seqs", "4"),
                    *("--enforce-eager", "--no-enable-prefix-caching"),
                    *("--plugins", "vllm_instant", "--instant-config", str(file)),
                ],
                log=Path(name) / "server.log",
                environment={"VLLM_CPU_KVCACHE_SPACE": "1"},
            )
            with running(server):
                cell = {"sampler": arm, "bound": bound, **speed_of(server, prompts)}
        print(cell, flush=True)
        write(output, [cell], "served", ("sampler", "bound"))


def speed_of(server: Server, prompts: Sequence[str]) -> dict[str, Any]:
    """Tokens per second of each request, and accepted tokens per step of all."""
    client = ServerClient(server.url, "demo")
    sampling = {"max_tokens": SERVED_TOKENS, "temperature": 1.0, "ignore_eos": True}
    complete(client, [client.body(prompt, **sampling) for prompt in prompts[:2]])
    settle()
    before = metric_totals(get(server.url, "/metrics").text)
    speeds = []
    for prompt in prompts:
        began = time.perf_counter()
        complete(client, [client.body(prompt, **sampling)])
        speeds.append(SERVED_TOKENS / (time.perf_counter() - began))
    after = metric_totals(get(server.url, "/metrics").text)
    accepted, steps = (
        after.get(f"vllm:spec_decode_num_{name}_total", 0.0) - before.get(f"vllm:spec_decode_num_{name}_total", 0.0)
        for name in ("accepted_tokens", "drafts")
    )
    return {
        "requests": len(prompts),
        "tokens_per_second": vars(median_interval(speeds)),
        "accepted_per_step": accepted / steps if steps else None,
    }


def main() -> None:
    """Measure one part, print, write ``benchmarks/results/samplers.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("time", "acceptance", "frontier", "served"))
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--places", type=int, default=1500, help="drafts of each class of text")
    parser.add_argument("--output", type=Path, default=HERE / "results/samplers.json")
    parser.add_argument("--only", default="", help="part of the names of the samplers that are served")
    parser.add_argument("--requests", type=int, default=8, help="requests to each server")
    options = parser.parse_args()
    if options.part == "served":
        served(options.only, options.requests, options.output)
        return
    measure = {"time": lambda: timed(options.rounds), "acceptance": lambda: accepted(options.places)}
    measure["frontier"] = lambda: frontier(options.places)
    cells = measure[options.part]()
    write(options.output, cells, options.part)


if __name__ == "__main__":
    main()
