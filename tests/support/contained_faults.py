"""One engine in this process whose plugins are exchanged for faulty ones, fault by fault; prints JSON.

    python contained_faults.py MODEL CELLS

For each cell: slot, hook and kind of fault, whether the answers were those of the engine before, whether the plugin is
disabled, and how many requests the scheduler still has.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

DEPLOYMENT = """
[speculation]
plugin = "fixed"
[drafter]
plugin = "suffix"
[batching]
plugin = "similarity"
"""
PROMPTS = ("def add(a, b):\n    return a + b\n\n\ndef sub(a, b):\n", "alpha = 1\nbeta = 2\n", "for i in range(")


def cells(count: int) -> list[tuple[str, str, str]]:
    """Hooks of the slots that run in the engine, each with several kinds of faults."""
    from faulty_plugins import FAULTS, SLOTS

    hooks = [(slot, hook) for slot in ("speculation", "batching", "drafter") for hook in SLOTS[slot][2]]
    kinds = [*FAULTS, "mutates"]
    # Numbers without a common divisor, so that all hooks meet different kinds.
    return [(*hooks[number % len(hooks)], kinds[number % len(kinds)]) for number in range(count)]


def main() -> None:
    """Run the cells."""
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_PLUGINS": "vllm_instant",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "HF_HUB_OFFLINE": "1",
        "TORCHDYNAMO_DISABLE": "1",
    }
    from vllm import LLM, SamplingParams

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "deploy.toml"
        file.write_text(DEPLOYMENT)
        llm = LLM(
            sys.argv[1],
            dtype="float32",
            enforce_eager=True,
            max_model_len=256,
            max_num_seqs=2,
            additional_config={"vllm_instant": str(file)},
        )
    core = llm.llm_engine.engine_core.engine_core
    greedy = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)

    def ask() -> list[list[int]]:
        return [list(answer.outputs[0].token_ids) for answer in llm.generate(list(PROMPTS), greedy, use_tqdm=False)]

    expected = ask()
    found = []
    for slot, hook, kind in cells(int(sys.argv[2])):
        guarded = exchange(core, slot, hook, kind)
        with watching(guarded, hook, kind):
            answers = ask()
            core.scheduler.instant_decisions(5)
            core.scheduler.instant_decisions(5, queue=True)
            core.scheduler.instant_totals()
        found.append(
            {
                "cell": [slot, hook, kind],
                "equal": answers == expected,
                "disabled": guarded.disabled,
                "left": len(core.scheduler.requests),
            }
        )
        print(json.dumps(found[-1]), file=sys.stderr, flush=True)
    print(json.dumps({"cells": found, "free": core.scheduler.kv_cache_manager.block_pool.get_num_free_blocks()}))


def exchange(core: Any, slot: str, hook: str, kind: str) -> Any:
    """Put a faulty plugin into a slot, and plugins that behave into the others."""
    from faulty_plugins import FAULTS, GoodDrafter, GoodSpeculation, mutating

    from vllm_instant.deployment.circuit_breaker import GuardedPlugin
    from vllm_instant.interfaces.scheduling import Admission, SchedulingPolicy
    from vllm_instant.scheduling.admission import AdmissionController

    class Batching(SchedulingPolicy):
        def admit(self, snapshot):  # type: ignore[no-untyped-def]
            return Admission(list(range(len(snapshot.waiting)))[::-1])

        def preemption_order(self, running):  # type: ignore[no-untyped-def]
            return list(range(len(running)))

        def max_prompt_tokens(self, snapshot):  # type: ignore[no-untyped-def]
            return 100

        def background_work(self, snapshot):  # type: ignore[no-untyped-def]
            return None

        def observe(self, outcome):  # type: ignore[no-untyped-def]
            return None

    made = {}
    numbers = itertools.cycle(range(8))
    for name, good in (("speculation", GoodSpeculation), ("batching", Batching), ("drafter", GoodDrafter)):
        replaced = {}
        if name == slot:
            faults = FAULTS.get(kind)
            replaced[hook] = mutating(getattr(good, hook)) if faults is None else faults[next(numbers) % len(faults)]
        made[name] = GuardedPlugin(name, "faulty", type("Plugin", (good,), replaced)())
    core.scheduler.instant_budget.policy = made["speculation"]
    core.scheduler.instant_batching = AdmissionController(made["batching"])
    core.model_executor.driver_worker.worker.model_runner.drafter.drafter = made["drafter"]
    return made[slot]


def watching(guarded: Any, hook: str, kind: str) -> Any:
    """The watchdog where a hook hangs."""
    from faulty_plugins import watched

    return watched(guarded, hook) if kind == "hangs" else contextlib.nullcontext()


if __name__ == "__main__":
    main()
