"""The contract of a speculation policy."""

from __future__ import annotations

import copy
import json
import math
import random
from collections.abc import Callable
from dataclasses import fields

from vllm_instant.interfaces.requests import RequestState
from vllm_instant.interfaces.speculation import SpeculationPolicy, StepOutcome, UpcomingStep
from vllm_instant.testing.reachable import ContractError, path_to, whole_number

STEPS = 200


def check_policy(build: Callable[[], SpeculationPolicy], *, max_draft_tokens: int = 5, seed: int = 0) -> None:
    """Check the contract of a speculation policy: lengths, types, untouched inputs, decisions, freed state.

    Args:
        build: returns a new policy.
        max_draft_tokens: the most draft tokens that a step allows per request.
        seed: of the requests and of what becomes of their drafts.

    Raises:
        ContractError: with one sentence.

    """
    policy = build()
    rng = random.Random(seed)
    running: list[RequestState] = []
    ended: list[str] = []
    for number in range(STEPS):
        if len(running) < 6 and rng.random() < 0.3:
            running.append(_request(rng, number, running))
            policy.enter(running[-1])
        granted = _ask(policy, UpcomingStep(list(running), max_draft_tokens, number=number))
        _check_cost(policy)
        policy.observe(_outcome(rng, running, granted, number + 1))
        for request in [request for request in running if rng.random() < 0.05]:
            running.remove(request)
            policy.forget(request.request_id)
            ended.append(request.request_id)
    for request in running:
        policy.forget(request.request_id)
    policy.forget("a request that never was")
    for request_id in [*ended, *(request.request_id for request in running)]:
        if path := path_to(policy, request_id, only_keys=True):
            raise ContractError(f"the state of an ended request is kept in {path}: free it in forget()")
    _check_decisions(policy)
    policy.close()


def _request(rng: random.Random, number: int, running: list[RequestState]) -> RequestState:
    return RequestState(
        f"request-{number}-of-the-check",
        num_prompt_tokens=rng.randint(1, 500),
        max_tokens=rng.randint(1, 500),
        temperature=rng.choice([0.0, 0.7, 1.0]),
        structured_output=rng.random() < 0.2,
        index=min(set(range(len(running) + 1)) - {request.index for request in running}),
        prompt_token_ids=[1, 2, 3],
    )


def _ask(policy: SpeculationPolicy, step: UpcomingStep) -> list[int]:
    before = [_contents(request) for request in step.requests]
    requests = list(step.requests)
    answer = policy.get_num_draft_tokens(step)
    if list(step.requests) != requests or [_contents(request) for request in requests] != before:
        raise ContractError("get_num_draft_tokens() changed the requests that it was given")
    if not hasattr(answer, "__len__") or len(answer) != len(requests):
        given = len(answer) if hasattr(answer, "__len__") else repr(answer)
        raise ContractError(
            f"get_num_draft_tokens() must return one number per request: {len(requests)} requests, found {given}"
        )
    for value in answer:
        if not whole_number(value):
            raise ContractError(f"numbers of draft tokens must be integers, found {value!r} of {type(value).__name__}")
        if not 0 <= value <= step.max_draft_tokens:
            raise ContractError(f"numbers of draft tokens must lie in 0..{step.max_draft_tokens}, found {value}")
    return [int(value) for value in answer]


def _contents(request: RequestState) -> dict[str, object]:
    return {field.name: copy.copy(getattr(request, field.name)) for field in fields(request)}


def _outcome(rng: random.Random, running: list[RequestState], granted: list[int], number: int) -> StepOutcome:
    accepted = [rng.randint(0, drafted) for drafted in granted]
    for request, kept in zip(running, accepted, strict=True):
        request.num_output_tokens += kept + 1
    return StepOutcome(
        list(running),
        granted,
        accepted,
        num_scheduled_tokens=sum(granted) + len(running),
        seconds=rng.uniform(0.005, 0.05),
        num_scheduled_requests=len(running),
        number=number,
        draft_steps=max(granted, default=0),
    )


def _check_cost(policy: SpeculationPolicy) -> None:
    cost = policy.draft_cost()
    figures = [getattr(cost, field.name) for field in fields(cost) if field.name != "verify_cost_curve"]
    figures += [value for _, value in cost.verify_cost_curve]
    if not all(math.isfinite(value) and value >= 0 for value in figures):
        raise ContractError(f"draft_cost() must be finite and not negative, found {cost}")


def _check_decisions(policy: SpeculationPolicy) -> None:
    decisions = policy.decisions(3)
    if len(decisions) > 3:
        raise ContractError(f"decisions(3) must return at most 3 decisions, found {len(decisions)}")
    policy.decisions(1, "a request that never was")
    try:
        json.dumps([dict(decision) for decision in decisions], allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ContractError(f"decisions() must hold plain finite JSON values: {error}") from None
