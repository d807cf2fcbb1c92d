"""Sessions as requests that wait for each other: conversations, agents and recorded traces.

A scenario describes a conversation by its number of turns and the pauses between them, and an agent by its steps. The
messages of a turn quote the answers before it (``session_progress.ANSWER_OF``), which the load generator fills in when
they are there. Prompts of traces are token ids: their lengths and shared prefixes are exactly the recorded ones, for
any model, and there are no texts that could be unusual for it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from vllm_instant_loadtests.prompts import LoadPrompt, long
from vllm_instant_loadtests.scenario import Bounds, Step, Traffic
from vllm_instant_loadtests.scheduled_request import ScheduledRequest
from vllm_instant_loadtests.session_progress import ANSWER_OF
from vllm_instant_loadtests.traces import TraceRequest

MakeBody = Callable[[LoadPrompt], dict[str, Any]]
"""The body of a request without its messages."""


def conversation(
    traffic: Traffic, asked: Sequence[LoadPrompt], make: MakeBody, choose: random.Random, at: float, number: int
) -> list[ScheduledRequest]:
    """The turns of one conversation, each with all earlier messages and answers.

    Args:
        traffic: with ``session``.
        asked: messages of the user, one per turn.
        make: bodies.
        choose: draws pauses.
        at: second of the timeline at which it begins.
        number: of its first request; also of the session.

    """
    if traffic.session is None:
        return []
    messages: list[dict[str, Any]] = []
    requests = []
    for turn, prompt in enumerate(asked):
        if turn:
            messages = [*messages, {"role": "assistant", ANSWER_OF: number + turn - 1}]
        messages = [*messages, *(prompt.before if not turn else ()), {"role": "user", "content": prompt.text}]
        requests.append(
            ScheduledRequest(
                number + turn,
                at,
                traffic.kind,
                "chat",
                {**make(prompt), "messages": messages},
                session=number,
                turn=turn,
                after=[number + turn - 1] if turn else [],
                pause=drawn(traffic.session.think_seconds, choose) if turn else 0.0,
            )
        )
    return requests


def agent(
    traffic: Traffic, task: LoadPrompt, make: MakeBody, choose: random.Random, at: float, number: int
) -> list[ScheduledRequest]:
    """The requests of one agent: its steps in order, parallel calls as siblings, branches by chance.

    A step's messages are those of its first parent, with the parent's answer (the call of a tool) and the tool's
    result; the answers of further parents follow as messages of the user.
    """
    made: dict[str, list[ScheduledRequest]] = {}
    requests: list[ScheduledRequest] = []
    for step in traffic.step:
        parents = [request for name in step.after for request in made.get(name, ())]
        skipped = step.after and len(parents) == 0
        if skipped or choose.random() >= step.chance:
            continue
        for _ in range(round(drawn(step.parallel, choose, whole=True))):
            request = _agent_request(traffic, step, task, parents, at, number, number + len(requests), make, choose)
            requests.append(request)
            made.setdefault(step.name, []).append(request)
    return requests


def _agent_request(
    traffic: Traffic,
    step: Step,
    task: LoadPrompt,
    parents: Sequence[ScheduledRequest],
    at: float,
    session: int,
    number: int,
    make: MakeBody,
    choose: random.Random,
) -> ScheduledRequest:
    if parents:
        first, *others = parents
        messages = [*first.body["messages"], {"role": "assistant", ANSWER_OF: first.number}]
        messages += [{"role": "user", ANSWER_OF: other.number} for other in others]
    else:
        messages = [*task.before, {"role": "user", "content": task.text}]
    size = round(drawn(step.result_characters, choose, whole=True))
    if size:
        result = long(1, f"{session}/{number}/{choose.getrandbits(32)}", size)[0]
        messages.append({"role": "user", "content": f"Result of the tool:\n{result}"})
    if step.text:
        messages.append({"role": "user", "content": step.text})
    body = {**make(task), "messages": messages}
    if step.max_tokens is not None:
        body["max_tokens"] = round(drawn(step.max_tokens, choose, whole=True))
    return ScheduledRequest(
        number,
        at,
        f"{traffic.kind}: {step.name}",
        "chat",
        body,
        session=session,
        turn=number - session,
        after=[parent.number for parent in parents],
        pause=drawn(step.pause_seconds, choose) if parents else 0.0,
    )


def replayed(
    traffic: Traffic,
    recorded: Sequence[TraceRequest],
    places: Sequence[int],
    make: MakeBody,
    seed: str,
    at: float,
    number: int,
) -> list[ScheduledRequest]:
    """The requests of one session of a trace, or one request without a session.

    Args:
        traffic: with the trace; ``length_scale`` shortens prompts, blocks and answers alike.
        recorded: the whole trace, with times as they are sent.
        places: of this session's requests in it.
        make: bodies.
        seed: of the token ids.
        at: second of the timeline at which the first one is due.
        number: of the first one.

    """
    numbers = {place: number + offset for offset, place in enumerate(places)}
    requests = []
    for turn, place in enumerate(places):
        one = recorded[place]
        body = make(LoadPrompt(""))
        prompt: str | list[int] = one.text or prompt_ids(traffic, one, seed)
        body |= {"prompt": prompt, "max_tokens": max(1, round(one.output_tokens * traffic.length_scale))}
        requests.append(
            ScheduledRequest(
                numbers[place],
                at,
                traffic.kind,
                "completions",
                body,
                session=number if len(places) > 1 else None,
                turn=turn,
                after=[numbers[parent] for parent in one.after],
                pause=one.pause,
            )
        )
    return requests


def prompt_ids(traffic: Traffic, one: TraceRequest, seed: str) -> list[int]:
    """Token ids of the recorded length: equal for equal hashes, and a session's prompts continue each other."""
    length = max(1, round(one.input_tokens * traffic.length_scale))
    if not one.hash_ids:
        name = f"{seed}/{one.session}" if one.session else f"{seed}/{one.at}/{one.input_tokens}"
        return _ids(name, length, traffic.token_ids)
    block = max(1, round(traffic.block_tokens * traffic.length_scale))
    ids: list[int] = []
    for block_id in one.hash_ids:
        ids += _ids(f"{seed}/block {block_id}", block, traffic.token_ids)
    missing = length - len(ids)
    if missing > 0:
        ids += _ids(f"{seed}/{one.at}/{one.hash_ids[-1]}", missing, traffic.token_ids)
    return ids[:length]


def drawn(bounds: Bounds, choose: random.Random, whole: bool = False) -> float:
    """A value, or one drawn uniformly between two bounds."""
    if not isinstance(bounds, tuple):
        return float(bounds)
    return float(choose.randint(round(bounds[0]), round(bounds[1])) if whole else choose.uniform(*bounds))


def _ids(name: str, count: int, bounds: tuple[int, int]) -> list[int]:
    generator = np.random.default_rng(list(name.encode()))
    return [int(token) for token in generator.integers(bounds[0], bounds[1], count)]
