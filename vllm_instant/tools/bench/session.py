"""Runs a plan: servers, rounds in random order, quality; every measurement goes into the checkpoint at once."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Protocol

from vllm_instant.tools.bench.checkpoint import BenchCheckpoint, Place
from vllm_instant.tools.bench.plan import BASELINE, BASELINE_AGAIN, BadInputError, BenchPlan, deployed
from vllm_instant.tools.measure import quality
from vllm_instant.tools.measure.energy import EnergyMeter, energy_meter
from vllm_instant.tools.measure.http_client import is_local
from vllm_instant.tools.measure.interleaved_rounds import interleaved, run_arm_round
from vllm_instant.tools.measure.prompts import built_in, held_out_texts
from vllm_instant.tools.measure.sampling import ServerClient, greedy_answers
from vllm_instant.tools.measure.server_info import ServerInfo, read_server_info
from vllm_instant.tools.measure.servers import START_TIMEOUT, Server, running

QUALITY_TOKENS = 48
"""Length of the answers of the quality rows."""
WARM_UP_TOKENS = 24


class ServerProvider(Protocol):
    """Where the servers come from."""

    @property
    def names(self) -> Sequence[str]:
        """The arms: the baseline, the second baseline server, the deployments."""
        ...

    @property
    def local(self) -> bool:
        """Whether the servers run on this machine."""
        ...

    def serving(self, start: int) -> AbstractContextManager[dict[str, ServerInfo]]:
        """The servers of one start, by arm."""
        ...

    @property
    def headers(self) -> Mapping[str, str]:
        """Headers of all requests to the servers."""
        ...


class ExternalServers:
    """Servers that were started elsewhere.

    Args:
        urls: by arm. Without a second baseline server the first one is asked twice.
        headers: of all requests to them.

    """

    def __init__(self, urls: Mapping[str, str], headers: Mapping[str, str]) -> None:
        self._urls = dict(urls)
        self._urls.setdefault(BASELINE_AGAIN, self._urls[BASELINE])
        self.names = [BASELINE, BASELINE_AGAIN, *deployed(list(self._urls))]
        self.headers = headers
        self.local = all(is_local(url) for url in urls.values())

    @contextmanager
    def serving(self, start: int) -> Iterator[dict[str, ServerInfo]]:
        """Check that they answer."""
        yield {name: read_server_info(self._urls[name], self.headers) for name in self.names}


class StartedServers:
    """Servers that are started for the measurement and run side by side.

    Args:
        model: of all arms.
        words: of each arm's command line.
        folder: for their logs.
        headers: of all requests to them.
        start_timeout: seconds without progress after which a start has failed.
        say: called with what a start is waiting for.

    """

    local = True

    def __init__(
        self,
        model: str,
        words: Mapping[str, Sequence[str]],
        folder: Path,
        headers: Mapping[str, str] | None = None,
        start_timeout: float = START_TIMEOUT,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        self._model, self._words, self._folder = model, words, folder
        self._start_timeout = start_timeout
        self.say = say
        self.headers = dict(headers or {})
        self.names = [BASELINE, BASELINE_AGAIN, *deployed(list(words))]

    @contextmanager
    def serving(self, start: int) -> Iterator[dict[str, ServerInfo]]:
        """New processes for every start."""
        servers = {
            name: Server(
                self._model,
                self._words[name],
                log=self._folder / f"{name.replace(' ', '-')}-{start}.log",
                start_timeout=self._start_timeout,
                name=name,
            )
            for name in self.names
        }
        with running(*servers.values(), say=lambda text: self.say(text)):
            yield {name: read_server_info(server.url, self.headers) for name, server in servers.items()}


def same_model(served: Mapping[str, ServerInfo]) -> None:
    """Raise BadInputError when the arms serve different models."""
    first = served[BASELINE]
    for arm in served.values():
        if arm.model != first.model:
            raise BadInputError(
                f"the servers have different models: {first.url} serves {first.root}, {arm.url} serves {arm.root}"
            )


def run_bench(
    plan: BenchPlan,
    arms: ServerProvider,
    state: BenchCheckpoint,
    say: Callable[[str, int], None],
    stage: int = 0,
) -> None:
    """Measure what the checkpoint lacks of one stage.

    Args:
        plan: of the measurement; its salt is the checkpoint's.
        arms: the servers.
        state: is filled.
        say: called with what is being done, and with how many rounds of an arm are done since the last call.
        stage: its number; later stages add rounds to earlier ones.

    """
    for start in range(plan.starts):
        places = [(number, users) for number in plan.rounds_of(start, stage) for users in plan.concurrency]
        todo = [place for place in places if not state.has(place)]
        say("", (len(places) - len(todo)) * len(arms.names))
        quality_due = start == plan.starts - 1 and stage == 0 and plan.texts > 0 and state.quality is None
        if not todo and not quality_due:
            continue
        number = stage * plan.starts + start
        say(f"waiting for the servers (start {start + 1} of {plan.starts})", 0)
        with arms.serving(number) as served:
            same_model(served)
            state.add_served({name: found.plain() for name, found in served.items()})
            clients = {name: found.arm(arms.headers) for name, found in served.items()}
            say("warming up", 0)
            _warm_up(plan, clients, state.attempt, number)
            _run_rounds(plan, clients, state, todo, energy_meter() if arms.local else None, say)
            if quality_due:
                state.add_quality(measure_quality(clients, plan, lambda text: say(f"quality: {text}", 0)))


def _run_rounds(
    plan: BenchPlan,
    clients: Mapping[str, ServerClient],
    state: BenchCheckpoint,
    places: Sequence[Place],
    energy: EnergyMeter | None,
    say: Callable[[str, int], None],
) -> None:
    for number, users in places:
        order = random.Random(f"{plan.salt}/{state.attempt}/{number}/{users}")
        prompts = plan.prompts_of(number, users, state.attempt)
        by_arm = {}
        for _, name in interleaved(list(clients), [number], order):
            say(f"round {number + 1}, {users} at a time: {name}", 0)
            by_arm[name] = run_arm_round(
                clients[name],
                prompts,
                concurrency=users,
                tokens=plan.tokens,
                seed=number * 1000,
                energy=energy.joules if energy else lambda: None,
            )
            say("", 1)
        state.add_round((number, users), by_arm)


def _warm_up(plan: BenchPlan, clients: Mapping[str, ServerClient], attempt: int, start: int) -> None:
    """Fill caches and compile kernels of all servers at once, with short answers that are not measured."""
    # Made before there are threads: Python 3.11 cannot parse sources in several of them.
    prompts = {users: plan.prompts_of(-1 - start, users, attempt) for users in plan.concurrency}

    def one(client: ServerClient) -> None:
        for users, own in prompts.items():
            run_arm_round(client, own, concurrency=users, tokens=min(plan.tokens, WARM_UP_TOKENS))

    with ThreadPoolExecutor(len(clients)) as pool:
        list(pool.map(one, clients.values()))


def measure_quality(
    clients: Mapping[str, ServerClient], plan: BenchPlan, tick: Callable[[str], None]
) -> dict[str, Any]:
    """The measurements of the quality rows, for every arm but the first baseline server.

    The baseline's greedy answers are requested one at a time, those of the others several at a time: in half precision,
    rounding depends on the shape of the batch, and the second baseline server shows how many answers that changes.
    """
    texts = held_out_texts(plan.texts)
    prompts = [prompt.text for prompt in built_in(plan.answers, f"{plan.salt}/quality")]
    baseline = clients[BASELINE]
    tick(BASELINE)
    greedy = [greedy_answers(baseline, [prompt], QUALITY_TOKENS)[0] for prompt in prompts]
    reading = quality.read_texts(baseline, texts)
    likelihood = quality.likelihood(baseline, baseline, prompts, QUALITY_TOKENS, 1.0)
    found = {}
    for name, client in clients.items():
        if name != BASELINE:
            tick(name)
            answers = greedy_answers(client, prompts, QUALITY_TOKENS)
            found[name] = {
                "same": [float(a == b) for a, b in zip(answers, greedy, strict=True)],
                "losses": quality.compare_readings(quality.read_texts(client, texts), reading).tolist(),
                "gaps": (quality.likelihood(client, baseline, prompts, QUALITY_TOKENS, 1.0) - likelihood).tolist(),
            }
    return found
