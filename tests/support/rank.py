"""One tensor-parallel rank's drafters through many requests' lives; prints what they drafted and ran, as JSON.

Ranks are processes whose sets of strings have orders of their own (``PYTHONHASHSEED``); in all else they get the same.
"""

from __future__ import annotations

import json
import random
from types import SimpleNamespace
from typing import Any

import numpy as np

from vllm_instant import DraftCost, DraftRequest
from vllm_instant.deployment.circuit_breaker import GuardedPlugin
from vllm_instant.patches import drafter as host_drafting
from vllm_instant.patches import hybrid_drafting, v2_drafter
from vllm_instant_plugins.hybrid.drafter import LookupHybridDrafter
from vllm_instant_plugins.suffix.drafter import SuffixDrafter

STEPS, LIVE, DRAFTS, ALPHABET, HISTORY = 120, 6, 4, 6, 60
COST = DraftCost(verify_cost_curve=((1, 0.1), (64, 6.4)), per_token=0.1, draft_fixed=0.05, per_draft_step=0.05)


def _lives(step: Any) -> list[Any]:
    """Call ``step`` with the ids that ended, a set, and the live requests' tokens; returns its results."""
    numbers, results, born = random.Random(0), [], 0
    live: dict[str, list[int]] = {}
    for _ in range(STEPS):
        ended = {name for name in live if numbers.random() < 0.1}
        for name in sorted(ended):
            del live[name]
        while len(live) < LIVE:
            live[f"request-{born}"] = [numbers.randrange(ALPHABET) for _ in range(4)]
            born += 1
        for tokens in live.values():
            tokens.append(numbers.randrange(ALPHABET))
        results.append(step(ended, live))
    return results


def _requests(live: dict[str, list[int]]) -> list[DraftRequest]:
    return [
        DraftRequest(name, host_drafting.read_only(np.array(tokens, np.int32)), 4, DRAFTS, "all")
        for name, tokens in live.items()
    ]


def _suffix() -> list[Any]:
    adapter = object.__new__(host_drafting.PluginDrafter)
    adapter.drafter = GuardedPlugin("drafter", "suffix", SuffixDrafter(256, HISTORY))
    runner = SimpleNamespace(drafter=adapter)

    def step(ended: set[str], live: dict[str, list[int]]) -> Any:
        host_drafting._update_states(lambda output: None, runner, SimpleNamespace(finished_req_ids=ended))
        return [list(draft.token_ids) for draft in adapter.drafter.instance.propose(_requests(live))]

    return _lives(step)


def _hybrid() -> list[Any]:
    plugin = LookupHybridDrafter(SuffixDrafter(256, HISTORY), DRAFTS)
    drafting = object.__new__(hybrid_drafting.HybridDraftRunner)
    drafting.drafter = GuardedPlugin("drafter", "hybrid", plugin)
    runner = SimpleNamespace(**{hybrid_drafting.HYBRID_ATTRIBUTE: drafting})

    def step(ended: set[str], live: dict[str, list[int]]) -> Any:
        hybrid_drafting._update_states(lambda output: None, runner, SimpleNamespace(finished_req_ids=ended))
        requests = _requests(live)
        assigned = plugin.assign(requests, COST)
        passes = {r.request_id: a.num_draft_tokens for r, a in zip(requests, assigned, strict=True)}
        plugin.on_model_drafts({name: [0] * count for name, count in passes.items() if count})
        return [[list(a.own), a.num_draft_tokens] for a in assigned]

    return _lives(step)


def _on_device() -> list[Any]:
    forgotten: list[str] = []
    speculator = object.__new__(v2_drafter.PluginSpeculator)
    speculator.begin_step = lambda plan: None  # type: ignore[method-assign]
    speculator.forget = forgotten.append  # type: ignore[method-assign]
    runner = SimpleNamespace(speculator=speculator)

    def step(ended: set[str], live: dict[str, list[int]]) -> Any:
        v2_drafter._finish_requests(lambda output: None, runner, SimpleNamespace(finished_req_ids=ended))
        return list(forgotten)

    return _lives(step)


if __name__ == "__main__":
    print(
        json.dumps(
            {
                "order of a set": list({f"request-{number}" for number in range(20)}),
                "suffix": _suffix(),
                "hybrid": _hybrid(),
                "on the device": _on_device(),
            }
        )
    )
