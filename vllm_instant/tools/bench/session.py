"""Runs a plan: servers, turns in random order, quality; what is measured goes into the state file at once."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Protocol

from vllm_instant.tools.bench.checkpoint import BenchCheckpoint
from vllm_instant.tools.bench.plan import BASELINE, BASELINE_AGAIN, BadInputError, BenchPlan, deployed
from vllm_instant.tools.measure import quality
from vllm_instant.tools.measure.energy import energy_meter
from vllm_instant.tools.measure.interleaved_rounds import interleaved, run_arm_round
from vllm_instant.tools.measure.prompts import built_in, held_out_texts
from vllm_instant.tools.measure.sampling import ServerClient, greedy_answers
from vllm_instant.tools.measure.server_info import ServerInfo, read_server_info
from vllm_instant.tools.measure.servers import Server, running

QUALITY_TOKENS = 48
"""Length of the answers of the quality rows."""
WARM_UP_TOKENS = 24


class ServerProvider(Protocol):
    """Where the servers come from."""

    @property
    def names(self) -> Sequence[str]:
        """Stock first, then the second stock server, then what is measured."""
        ...

    @property
    def local(self) -> bool:
        """Whether they run on this machine."""
        ...

    def serving(self, start: int) -> AbstractContextManager[dict[str, ServerInfo]]:
        """The servers of one start, by arm."""
        ...

    @property
    def headers(self) -> Mapping[str, str]:
        """For requests to them."""
        ...


class ExternalServers:
    """Servers that somebody else has started.

    Args:
        urls: by arm. Without a second stock server the first one is asked twice.
        headers: for requests to them.

    """

    def __init__(self, urls: Mapping[str, str], headers: Mapping[str, str]) -> None:
        self._urls = dict(urls)
        self._urls.setdefault(BASELINE_AGAIN, self._urls[BASELINE])
        self.names = [BASELINE, BASELINE_AGAIN, *deployed(list(self._urls))]
        self.headers = headers
        self.local = all("//127." in url or "//localhost" in url or "//[::1]" in url for url in urls.values())

    @contextmanager
    def serving(self, start: int) -> Iterator[dict[str, ServerInfo]]:
        """Look whether they are there."""
        yield {name: read_server_info(self._urls[name], self.headers) for name in self.names}


class StartedServers:
    """Servers that are started together, side by side.

    Args:
        model: for all of them.
        words: of each arm's command line.
        folder: for their logs.

    """

    headers: Mapping[str, str] = {}
    local = True

    def __init__(self, model: str, words: Mapping[str, Sequence[str]], folder: Path) -> None:
        self._model, self._words, self._folder = model, words, folder
        self.names = [BASELINE, BASELINE_AGAIN, *deployed(list(words))]

    @contextmanager
    def serving(self, start: int) -> Iterator[dict[str, ServerInfo]]:
        """New processes for every start."""
        servers = {
            name: Server(self._model, self._words[name], log=self._folder / f"{name.replace(' ', '-')}-{start}.log")
            for name in self.names
        }
        with running(*servers.values()):
            yield {name: read_server_info(server.url) for name, server in servers.items()}


def same_model(served: Mapping[str, ServerInfo]) -> None:
    """Raise BadInputError when the arms serve different models."""
    stock = served[BASELINE]
    for arm in served.values():
        if arm.model != stock.model:
            raise BadInputError(
                f"the servers have different models: {stock.url} serves {stock.root}, {arm.url} serves {arm.root}"
            )


def run_bench(plan: BenchPlan, arms: ServerProvider, state: BenchCheckpoint, say: Callable[[str, int], None]) -> None:
    """Measure what the state file does not have yet.

    Args:
        plan: what is measured; its salt is the state's.
        arms: the servers.
        state: is filled.
        say: told what is going on, and how many turns are done since it was told before.

    """
    energy = energy_meter() if arms.local else None
    for start in range(plan.starts):
        places = [(number, users) for number in plan.rounds_of(start) for users in plan.concurrency]
        todo = [place for place in places if not state.has(place)]
        say("", (len(places) - len(todo)) * len(arms.names))
        last = start == plan.starts - 1 and plan.texts > 0 and state.quality is None
        if not todo and not last:
            continue
        say(f"waiting for the servers (start {start + 1} of {plan.starts})", 0)
        with arms.serving(start) as served:
            same_model(served)
            state.add_served({name: found.plain() for name, found in served.items()})
            asked = {name: found.arm(arms.headers) for name, found in served.items()}
            say("warming up", 0)
            _warm_up(plan, asked, state.attempt, start)
            for number, users in todo:
                order = random.Random(f"{plan.salt}/{state.attempt}/{number}/{users}")
                prompts = plan.prompts_of(number, users, state.attempt)
                turns = {}
                for _, name in interleaved(arms.names, [number], order):
                    say(f"round {number + 1} of {plan.rounds}, {users} at a time: {name}", 0)
                    turns[name] = run_arm_round(
                        asked[name],
                        prompts,
                        concurrency=users,
                        tokens=plan.tokens,
                        seed=number * 1000,
                        energy=energy.joules if energy else lambda: None,
                    )
                    say("", 1)
                state.add_round((number, users), turns)
            if last:
                state.add_quality(measure_quality(asked, plan, lambda text: say(f"quality: {text}", 0)))


def _warm_up(plan: BenchPlan, asked: Mapping[str, ServerClient], attempt: int, start: int) -> None:
    """All servers at once and with few tokens: caches fill and kernels compile; nothing of it is measured."""
    # Made before there are threads: Python 3.11 cannot parse sources in several of them.
    prompts = {users: plan.prompts_of(-1 - start, users, attempt) for users in plan.concurrency}

    def one(arm: ServerClient) -> None:
        for users, asked_for in prompts.items():
            run_arm_round(arm, asked_for, concurrency=users, tokens=min(plan.tokens, WARM_UP_TOKENS))

    with ThreadPoolExecutor(len(asked)) as pool:
        list(pool.map(one, asked.values()))


def measure_quality(asked: Mapping[str, ServerClient], plan: BenchPlan, tick: Callable[[str], None]) -> dict[str, Any]:
    """What the quality rows are made from, for every arm but the first stock server.

    Stock's greedy answers are asked for one at a time, the others' several at a time: in half precision, rounding
    depends on the shape of the batch, and the second stock server shows how many answers that changes.
    """
    texts = held_out_texts(plan.texts)
    prompts = [prompt.text for prompt in built_in(plan.answers, f"{plan.salt}/quality")]
    stock = asked[BASELINE]
    tick("stock")
    greedy = [greedy_answers(stock, [prompt], QUALITY_TOKENS)[0] for prompt in prompts]
    reading = quality.read_texts(stock, texts)
    likelihood = quality.likelihood(stock, stock, prompts, QUALITY_TOKENS, 1.0)
    found = {}
    for name, arm in asked.items():
        if name != BASELINE:
            tick(name)
            answers = greedy_answers(arm, prompts, QUALITY_TOKENS)
            found[name] = {
                "same": [float(a == b) for a, b in zip(answers, greedy, strict=True)],
                "losses": quality.compare_readings(quality.read_texts(arm, texts), reading).tolist(),
                "gaps": (quality.likelihood(arm, stock, prompts, QUALITY_TOKENS, 1.0) - likelihood).tolist(),
            }
    return found
