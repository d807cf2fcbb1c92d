"""What a seed costs in accepted drafts, and whether a seeded answer stays what it is without drafts.

    .venv/bin/python benchmarks/seeds.py [--batches 6]        # 7 minutes

The demo's target and draft model in float32, one engine in this process, batches of 14 requests with new prompts of one
class. Each batch is served three times: without drafts and with seeds, with four drafts per step and the same seeds,
and with four drafts and no seeds. An unseeded request verifies its drafts by block verification, which keeps as many as
any rule can; a seeded one must answer as it would without drafts, so its drafts are sampled with the random numbers
that the target will use (Daliri et al. 2024). ``kept`` is accepted draft tokens per draft token, seeded over unseeded,
over batches.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cold_start import CLIENT_KEY, Engine, in_serving_environment
from results import HERE, write

from vllm_instant.tools.measure.closed_loop import PromptSpec
from vllm_instant.tools.measure.prompts import free, snippets
from vllm_instant.tools.measure.statistics import median_interval, ratio_interval

CLASSES = ("free", "code", "structured")
SAMPLING = ({"temperature": 1.0, "top_p": 1.0}, {"temperature": 0.7, "top_p": 0.9})
REQUESTS, TOKENS, DRAFTS = 14, 64, 4
OFF, SEEDED, UNSEEDED = "off, seeded", "seeded", "unseeded"
ARMS: dict[str, str | int] = {OFF: "off", SEEDED: DRAFTS, UNSEEDED: DRAFTS}


def prompts_of(kind: str, number: int) -> list[PromptSpec]:
    """The prompts of one batch."""
    name = f"seeds {number}"
    return free(REQUESTS, name) if kind == "free" else snippets(kind, 0.0, REQUESTS, name)


def serve(
    engine: Engine, prompts: Sequence[PromptSpec], arm: str, number: int, sampling: dict[str, float]
) -> tuple[list[tuple[int, ...]], float]:
    """The answers of one batch, and its accepted draft tokens per draft token (0 without drafts)."""
    from vllm import SamplingParams

    parameters = [
        SamplingParams(
            **sampling,  # type: ignore[arg-type]
            max_tokens=TOKENS,
            ignore_eos=True,
            seed=None if arm == UNSEEDED else 1000 * number + place,
            extra_args={CLIENT_KEY: ARMS[arm]},
        )
        for place in range(len(prompts))
    ]
    before = engine.counts()
    answers = engine.llm.generate([prompt.text for prompt in prompts], parameters, use_tqdm=False)
    drafted, accepted = (after - earlier for after, earlier in zip(engine.counts(), before, strict=True))
    return [tuple(answer.outputs[0].token_ids) for answer in answers], accepted / max(drafted, 1)


def measure(engine: Engine, kind: str, sampling: dict[str, float], batches: int) -> dict[str, Any]:
    """One class of prompts under one way of sampling."""
    accepted: dict[str, list[float]] = {SEEDED: [], UNSEEDED: []}
    equal = 0
    for number in range(batches):
        prompts, texts = prompts_of(kind, number), {}
        for arm in random.Random(number).sample(list(ARMS), len(ARMS)):
            texts[arm], share = serve(engine, prompts, arm, number, sampling)
            if arm != OFF:
                accepted[arm].append(share)
        equal += sum(one == other for one, other in zip(texts[OFF], texts[SEEDED], strict=True))
    return {
        "prompts": kind,
        **sampling,
        "requests": batches * REQUESTS,
        "equal_answers": equal,
        "accepted_per_draft": {arm: vars(median_interval(values)) for arm, values in accepted.items()},
        "kept": vars(ratio_interval(accepted[SEEDED], accepted[UNSEEDED])),
    }


def main() -> None:
    """Measure, print, write ``benchmarks/results/seeds.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=6)
    parser.add_argument("--output", type=Path, default=HERE / "results/seeds.json")
    options = parser.parse_args()
    in_serving_environment()
    with tempfile.TemporaryDirectory(prefix="seeds-") as name:
        engine = Engine("trained", Path(name), dtype="float32")
        engine.start(engine.policy())
        cells = []
        for kind in CLASSES:
            for sampling in SAMPLING:
                cells.append(measure(engine, kind, dict(sampling), options.batches))
                print(cells[-1], flush=True)
                write(options.output, cells)


if __name__ == "__main__":
    main()
