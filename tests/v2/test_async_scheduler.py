"""Random lives on the asynchronous scheduler with two steps in flight: draft lengths, counts, and what is left over."""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import pytest
import scheduler_harness as harness

from vllm_instant.deployment import deployment_env
from vllm_instant.deployment.settings import resolve
from vllm_instant.patches.names import PLAN_ATTRIBUTE
from vllm_instant.patches.scheduler import create_scheduler

DRAFTS = 4
STEPS = 150
IN_FLIGHT = 2
SMALL_CACHE, LARGE_CACHE = 40, 4000


@dataclass
class Life:
    """A scheduler, the steps in flight, and what really happened to the drafts of finished steps."""

    scheduler: Any
    random: random.Random
    in_flight: deque[Any] = field(default_factory=deque)
    plan: dict[str, int] = field(default_factory=dict)
    proposed: int = 0
    accepted: int = 0
    preempted: int = 0
    added: int = 0
    cached: int = 0

    def add(self, prompts: int) -> None:
        """A request with one of a few prompts, so that later ones are found in the prefix cache."""
        number = self.random.randrange(prompts)
        request = harness.make_request(
            number, prompt_tokens=33 + 32 * number, max_tokens=self.random.randrange(1, 90), request_id=f"r{self.added}"
        )
        self.added += 1
        self.scheduler.add_request(request)

    def abort(self) -> None:
        from vllm.v1.request import RequestStatus

        if self.scheduler.requests:
            victim = self.random.choice(sorted(self.scheduler.requests))
            self.scheduler.finish_requests(victim, RequestStatus.FINISHED_ABORTED)

    def schedule(self) -> None:
        output = self.scheduler.schedule()
        if not output.total_num_scheduled_tokens:
            return
        self.scheduler.get_grammar_bitmask(output)
        # A request that starts or resumes has no drafts yet.
        starting = {request.req_id for request in output.scheduled_new_reqs}
        starting |= output.scheduled_cached_reqs.resumed_req_ids
        self.preempted += len(output.preempted_req_ids or ())
        self.cached += sum(output.num_scheduled_tokens[request_id] == 1 for request_id in starting)
        for request_id, drafts in output.scheduled_spec_decode_tokens.items():
            assert request_id not in starting
            assert len(drafts) <= self.plan[request_id], "more drafts than were planned a step before"
        self.plan = dict(getattr(output, PLAN_ATTRIBUTE).num_draft_tokens)
        self.in_flight.append((output, self._prefilling(output)))

    def _prefilling(self, output: Any) -> set[str]:
        """Requests that sample nothing in this step, since some of their tokens are left to compute."""
        cached = output.scheduled_cached_reqs
        computed = dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        computed |= {request.req_id: request.num_computed_tokens for request in output.scheduled_new_reqs}
        return {
            request_id
            for request_id, scheduled in output.num_scheduled_tokens.items()
            if computed[request_id] + scheduled < self.scheduler.requests[request_id].num_tokens
        }

    def finish(self) -> None:
        """The oldest step in flight ends; a random number of its drafts is accepted."""
        output, prefilling = self.in_flight.popleft()
        accepted = {}
        for request_id, drafts in output.scheduled_spec_decode_tokens.items():
            accepted[request_id] = self.random.randint(0, len(drafts))
            if request_id in self.scheduler.requests and request_id not in prefilling:
                self.proposed += len(drafts)
                self.accepted += accepted[request_id]
        self.scheduler.update_from_output(output, harness.answer(output, accepted, prefilling))

    def run(self, prompts: int = 6, arrivals: float = 0.25, aborts: float = 0.03) -> None:
        for _ in range(STEPS):
            while self.random.random() < arrivals:
                self.add(prompts)
            if self.random.random() < aborts:
                self.abort()
            self.schedule()
            if len(self.in_flight) == IN_FLIGHT:
                self.finish()
        for _ in range(4000):
            if not self.scheduler.requests:
                break
            self.schedule()
            if self.in_flight:
                self.finish()
        while self.in_flight:
            self.finish()


@pytest.fixture
def live(monkeypatch, demo_pair):
    """``live(seed, *overrides)``: a new scheduler under a deployment given as overrides."""

    def build(seed: int, *overrides: str, blocks: int = LARGE_CACHE, prefix_caching: bool = False) -> Life:
        monkeypatch.setenv(deployment_env.VARIABLE, "")
        monkeypatch.setenv("VLLM_RAY_EXTRA_ENV_VARS_TO_COPY", "")
        deployment_env.set_deployment(resolve(None, overrides))
        config = harness.engine_config(demo_pair.target, DRAFTS, 16, asynchronous=True)
        config.cache_config.num_gpu_blocks = blocks
        config.cache_config.enable_prefix_caching = prefix_caching
        return Life(harness.make_scheduler(create_scheduler, config), random.Random(seed))

    return build


DEPLOYMENTS = {
    "varying lengths": ("speculation.plugin=cycling",),
    "goodput": ("speculation.plugin=goodput", "speculation.keep_costs=false"),
    "goodput and similarity": (
        "speculation.plugin=goodput",
        "speculation.keep_costs=false",
        "batching.plugin=similarity",
        "batching.keep_lengths=false",
    ),
}


@pytest.mark.usefixtures("with_test_plugins")
@pytest.mark.parametrize("blocks", [SMALL_CACHE, LARGE_CACHE], ids=["preemptions", "no preemptions"])
@pytest.mark.parametrize("deployment", DEPLOYMENTS)
@pytest.mark.parametrize("seed", range(3))
def test_counts_are_the_truth_and_nothing_is_left_over(live, deployment, blocks, seed):
    life = live(seed, *DEPLOYMENTS[deployment], blocks=blocks)
    life.run()
    totals = life.scheduler.instant_totals()["speculation"]
    assert (totals["proposed"], totals["accepted"]) == (life.proposed, life.accepted)
    if blocks == LARGE_CACHE:
        assert not life.preempted
    elif deployment == "varying lengths":
        # goodput decides by measured time, so that its requests may do with fewer blocks.
        assert life.preempted
    assert life.scheduler.requests == {}
    assert not life.scheduler.instant_budget.states
    pool = life.scheduler.kv_cache_manager.block_pool
    assert pool.get_num_free_blocks() == blocks - 1, "one block is vLLM's own null block"
    assert life.scheduler.instant_totals()["failures"] == []


@pytest.mark.usefixtures("with_test_plugins")
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("blocks", [SMALL_CACHE, LARGE_CACHE], ids=["preemptions", "no preemptions"])
def test_fully_cached_prompts_start_without_placeholders(live, seed, blocks):
    life = live(seed, "speculation.plugin=cycling", blocks=blocks, prefix_caching=True)
    life.run(prompts=2)
    assert life.cached, "no request was found in the prefix cache as a whole"
    totals = life.scheduler.instant_totals()["speculation"]
    assert (totals["proposed"], totals["accepted"]) == (life.proposed, life.accepted)
