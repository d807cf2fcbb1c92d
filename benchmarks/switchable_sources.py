"""Plugins for ``drafter_limit.py``: one ``hybrid`` server whose requests say which of its sources may draft for them.

A request names its arm as its ``cache_salt``, which both the scheduler and the workers see: ``suffix`` (lookups alone,
the draft model does not run), ``model`` (the draft model alone), ``hybrid``, and ``recorded`` (the draft model alone;
what it drafts is written to the file that ``SWITCHABLE_SOURCES_RECORD`` names). Every arm has a drafter with a history
and a ``goodput`` policy of its own, so that no arm looks up or knows what another one has seen. Arms do not overlap in
time. In place of the policy's decisions ``GET /v1/instant/decisions`` answers what each step did and took.
"""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from vllm_instant import (
    Draft,
    DraftCost,
    DraftRequest,
    Plugin,
    PluginContext,
    PluginOptions,
    RequestState,
    SpeculationPolicy,
    StepOutcome,
    UpcomingStep,
    hookimpl,
)
from vllm_instant.interfaces.drafter import DraftAssignment, HybridDrafter
from vllm_instant.speculation.draft_plan import trim_drafts
from vllm_instant_plugins.goodput.plugin import warm_up
from vllm_instant_plugins.goodput.policy import GoodputPolicy
from vllm_instant_plugins.hybrid.drafter import LookupHybridDrafter
from vllm_instant_plugins.hybrid.plugin import PLUGIN as HYBRID_PLUGIN
from vllm_instant_plugins.hybrid.plugin import HybridOptions
from vllm_instant_plugins.suffix.drafter import SuffixDrafter
from vllm_instant_plugins.suffix.plugin import build as build_lookup

OFF, SUFFIX, MODEL, HYBRID, RECORDED = "off", "suffix", "model", "hybrid", "recorded"
RECORD_VARIABLE = "SWITCHABLE_SOURCES_RECORD"
MODEL_LENGTH = 8
"""Most draft tokens of the draft model alone, as ``drafters.py`` serves it."""
TURN_KEY = "benchmark_turn"
"""In the ``vllm_xargs`` of each request: what its steps are found by."""
KEPT_STEPS = 2048


class LookupAlone(HybridDrafter):
    """``suffix`` where a draft model could run: it never does."""

    def __init__(self, lookup: SuffixDrafter) -> None:
        self._lookup = lookup

    def propose(self, requests: Sequence[DraftRequest]) -> Sequence[Draft]:
        """The lookups."""
        return self._lookup.propose(requests)

    def assign(self, requests: Sequence[DraftRequest], draft_cost: DraftCost) -> Sequence[DraftAssignment]:
        """The lookups, cut as the workers cut those of ``suffix``."""
        drafts = trim_drafts(self._lookup.propose(requests), draft_cost, [request.is_fixed for request in requests])
        return [DraftAssignment(list(draft)) for draft in drafts]

    def on_model_drafts(self, drafts: Mapping[str, Sequence[int]]) -> None:
        """Never."""

    def forget(self, request_id: str) -> None:
        """Passed on."""
        self._lookup.forget(request_id)


class ModelAlone(HybridDrafter):
    """The draft model for everybody, as far as the policy granted."""

    def propose(self, requests: Sequence[DraftRequest]) -> Sequence[Sequence[int]]:
        """Nothing of its own."""
        return [()] * len(requests)

    def assign(self, requests: Sequence[DraftRequest], draft_cost: DraftCost) -> Sequence[DraftAssignment]:
        """All to the model."""
        return [DraftAssignment(num_draft_tokens=request.max_draft_tokens) for request in requests]

    def on_model_drafts(self, drafts: Mapping[str, Sequence[int]]) -> None:
        """Not remembered."""


class Recorded(ModelAlone):
    """Writes a line of JSON for each request that has ended: its tokens, and the model's drafts by place."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._requests: dict[str, dict[str, Any]] = {}

    def assign(self, requests: Sequence[DraftRequest], draft_cost: DraftCost) -> Sequence[DraftAssignment]:
        """All to the model."""
        for request in requests:
            record = self._requests.setdefault(
                request.request_id, {"prompt_tokens": request.num_prompt_tokens, "drafts": {}}
            )
            record["tokens"] = request.token_ids.tolist()
        return super().assign(requests, draft_cost)

    def on_model_drafts(self, drafts: Mapping[str, Sequence[int]]) -> None:
        """Behind the tokens that there are now."""
        for request_id, draft in drafts.items():
            record = self._requests[request_id]
            record["drafts"][len(record["tokens"])] = list(draft)

    def forget(self, request_id: str) -> None:
        """Written down."""
        record = self._requests.pop(request_id, None)
        if record is not None:
            with open(self._path, "a") as file:
                file.write(json.dumps(record) + "\n")


class SwitchableSources(HybridDrafter):
    """Drafts as the arm of the requests says."""

    def __init__(self, options: HybridOptions, context: PluginContext) -> None:
        self._arms: dict[str, HybridDrafter] = {
            SUFFIX: LookupAlone(build_lookup(options, context)),
            MODEL: ModelAlone(),
            RECORDED: Recorded(os.environ[RECORD_VARIABLE]),
            HYBRID: LookupHybridDrafter(build_lookup(options, context), context.num_speculative_tokens),
        }
        self._arm = self._arms[HYBRID]

    def propose(self, requests: Sequence[DraftRequest]) -> Sequence[Sequence[int] | Draft]:
        """Passed on."""
        return self._arm.propose(requests)

    def assign(self, requests: Sequence[DraftRequest], draft_cost: DraftCost) -> Sequence[DraftAssignment]:
        """Passed on to the arm of the first request, which is that of all."""
        self._arm = self._arms.get(requests[0].cache_salt, self._arms[HYBRID])
        return self._arm.assign(requests, draft_cost)

    def on_model_drafts(self, drafts: Mapping[str, Sequence[int]]) -> None:
        """Passed on."""
        self._arm.on_model_drafts(drafts)

    def forget(self, request_id: str) -> None:
        """Passed on to all: those that do not know it do nothing."""
        for arm in self._arms.values():
            arm.forget(request_id)


class SwitchablePolicies(SpeculationPolicy):
    """One ``goodput`` an arm; writes down what each step did."""

    def __init__(self, context: PluginContext) -> None:
        def policy(most: int, confident: bool) -> GoodputPolicy:
            return GoodputPolicy(
                min(most, context.num_speculative_tokens), context.max_num_seqs, confident_drafts=confident
            )

        most = context.num_speculative_tokens
        self._policies = {
            OFF: policy(most, True),
            SUFFIX: policy(most, True),
            MODEL: policy(MODEL_LENGTH, False),
            HYBRID: policy(most, True),
            RECORDED: policy(most, True),
        }
        self._arm = HYBRID
        self._steps: deque[dict[str, Any]] = deque(maxlen=KEPT_STEPS)

    def enter(self, request: RequestState) -> None:
        """Its arm is the server's from now on."""
        self._arm = request.cache_salt if request.cache_salt in self._policies else HYBRID
        self._policies[self._arm].enter(request)

    def get_num_draft_tokens(self, step: UpcomingStep) -> Sequence[int]:
        """Passed on."""
        most = MODEL_LENGTH if self._arm == MODEL else step.max_draft_tokens
        return self._policies[self._arm].get_num_draft_tokens(
            replace(step, max_draft_tokens=min(most, step.max_draft_tokens))
        )

    def draft_cost(self) -> DraftCost:
        """Passed on."""
        return self._policies[self._arm].draft_cost()

    def observe(self, outcome: StepOutcome) -> None:
        """Passed on, and kept."""
        if not outcome.requests:
            return
        # Seen when the next step runs, which may be another arm's.
        first = outcome.requests[0]
        self._policies.get(first.cache_salt, self._policies[HYBRID]).observe(outcome)
        drafted, produced = sum(outcome.drafted), len(outcome.requests)
        self._steps.append(
            {
                "turn": first.extra_args.get(TURN_KEY),
                "milliseconds": outcome.seconds * 1e3,
                "requests": outcome.num_scheduled_requests,
                "drafted": drafted,
                "tokens": produced + sum(outcome.accepted),
                "draft_steps": outcome.draft_steps,
                "prompt_tokens": outcome.num_scheduled_tokens - outcome.num_scheduled_requests - drafted,
            }
        )

    def decisions(self, last: int, request_id: str | None = None) -> Sequence[Mapping[str, Any]]:
        """The newest steps; nothing is known of requests."""
        return list(self._steps)[-last:]


def _build_policies(options: PluginOptions, context: PluginContext) -> SwitchablePolicies:
    warm_up()
    return SwitchablePolicies(context)


@hookimpl
def instant_plugins() -> Iterable[Plugin]:
    """The arms, for the benchmark's deployment."""
    return [
        Plugin(
            slot="drafter",
            name="switchable_sources",
            summary="benchmark",
            options=HybridOptions,
            build=SwitchableSources,
            engine_arguments=HYBRID_PLUGIN.engine_arguments,
            confident=True,
        ),
        Plugin(slot="speculation", name="switchable_policies", summary="benchmark", build=_build_policies),
    ]
