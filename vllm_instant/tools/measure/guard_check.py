"""Whether a guard keeps its promise: planted violations in answers on every path to a client, and clean texts.

The tokens of the answers are given; all else is vLLM's own output processor and the deployment's plugin. Texts come
from the demo corpus (``tools.demo.corpus``).
"""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from prometheus_client import CollectorRegistry
from scipy.stats import beta

from vllm_instant.deployment.circuit_breaker import GuardedPlugin
from vllm_instant.deployment.resolved import installed_plugin, plugin_options
from vllm_instant.guard.answer import GuardedAnswer
from vllm_instant.guard.metrics import GuardMetrics
from vllm_instant.guard.service import GuardService
from vllm_instant.guard.window import Window
from vllm_instant.interfaces.deployment import Deployment
from vllm_instant.interfaces.guard import GuardOptions, Late
from vllm_instant.interfaces.plugins import PluginContext
from vllm_instant.patches.guard_replay import ForcedAnswer, ForcedEngine, Received
from vllm_instant.tools.demo.corpus import documents

FILLERS = ("", "", "", "✨ Дом 家 e\u0301 🎉👨‍👩‍👧 ", "ﬁne \u200b\u200d\u00ad text ")
"""Text between: mostly none, else characters of several bytes, signs that join, and invisible ones."""
_CONTEXT = PluginContext(
    model="", max_model_len=1, max_num_seqs=1, vocab_size=1, num_speculative_tokens=0, device="cpu"
)
"""A guard sees texts, and nothing of the engine."""
PASSAGE = 200
"""Characters of a clean passage."""
AT_ONCE = 64


@dataclass(frozen=True)
class Planted:
    """One answer with a violation in it."""

    path: str
    forced: ForcedAnswer
    start: int
    """Where the violation begins in the answer's text."""
    num_before: int
    """Number of leading tokens that have no part of it."""


@dataclass
class LeakReport:
    """What reached clients of planted violations."""

    count: int = 0
    stopped: int = 0
    """Answers that were stopped or changed; the others were disconnected or ended before the violation was complete."""
    leaked: int = 0
    """Answers of which more than the window reached the client."""
    max_leak: int = 0
    """Maximum number of tokens of a violation, or behind its beginning, that reached a client."""
    by_path: Counter[str] = field(default_factory=Counter)
    missed: int = 0
    """Answers whose violation was complete and was not stopped."""


@dataclass(frozen=True)
class FalseStops:
    """Clean passages that were stopped or changed."""

    count: int
    stopped: int

    def interval(self) -> tuple[float, float]:
        """The exact 95 % interval of the rate (Clopper and Pearson 1934)."""
        low = float(beta.ppf(0.025, self.stopped, self.count - self.stopped + 1)) if self.stopped else 0.0
        high = float(beta.ppf(0.975, self.stopped + 1, self.count - self.stopped)) if self.stopped < self.count else 1.0
        return low, high


@dataclass(frozen=True)
class Cost:
    """What the guard adds to clean, streamed answers, beside the same answers without it."""

    seconds_per_token: float
    baseline_seconds_per_token: float
    later_steps: float
    """Mean number of steps by which the first text came later."""
    max_gap_steps: int
    """99th percentile of the number of steps between two parts of an answer."""


def build_service(deployment: Deployment) -> GuardService:
    """Build a deployment's guard outside of a server; raises ValueError where it has none."""
    plugin = installed_plugin(deployment, "guard").plugin
    options = plugin_options(deployment, "guard")
    if plugin.build is None or not isinstance(options, GuardOptions):
        raise ValueError("[guard] is off in this deployment")
    guarded: GuardedPlugin[Any] = GuardedPlugin("guard", plugin.name, plugin.build(options, _CONTEXT))
    return GuardService(guarded, options, GuardMetrics(plugin.name, CollectorRegistry()))


def passages(count: int, characters: int = PASSAGE) -> Iterator[str]:
    """Yield passages of the demo corpus, by several passes with shifted borders if it is short."""
    texts: list[str] = []

    def first_time() -> Iterator[str]:
        for document in documents():
            texts.append(document.text)
            yield document.text

    for shift in itertools.count():
        begin = shift * 37 % characters
        for text in texts if shift else first_time():
            for start in range(begin, len(text) - characters, characters):
                if count <= 0:
                    return
                count -= 1
                yield text[start : start + characters]


class GuardCheck:
    """Checks one guard.

    Args:
        service: The guard.
        tokenizer: A folder with a tokenizer.
        violations: Texts that the guard must stop.
        is_clean: Says of a passage, by other means than the guard's, whether it has no violation.
        seed: Of everything that is drawn; each number has passages of its own, too.

    """

    def __init__(
        self,
        service: GuardService,
        tokenizer: Path,
        violations: Sequence[str],
        is_clean: Callable[[str], bool] = lambda text: True,
        seed: int = 0,
    ) -> None:
        self._service = service
        self._engine = ForcedEngine(tokenizer, service)
        self._baseline = ForcedEngine(tokenizer, None)
        self._violations = violations
        self._is_clean = is_clean
        self._seed = seed
        self._random = random.Random(seed)
        options = service.options
        self.window = options.hold_tokens if options.late is Late.RELEASE else 0

    def _passages(self, count: int) -> Iterator[str]:
        return itertools.islice(passages((self._seed + 1) * count), self._seed * count, None)

    def plant(self, count: int) -> Iterator[Planted]:
        """Yield answers with violations at random places, over all paths."""
        draw, tokenizer = self._random, self._engine.tokenizer
        for number, passage in enumerate(self._passages(count)):
            before = passage[: draw.randrange(0, 120)] + draw.choice(FILLERS)
            before = f"{before.rstrip()} " if before.strip() else ""
            violation = draw.choice(self._violations)
            text = f"{before}{violation} {passage[120 : 120 + draw.randrange(0, 60)]}"
            token_ids = tokenizer.encode(text, add_special_tokens=False)
            path, options = _PATHS[number % len(_PATHS)]
            if path == "disconnect":
                options = {**options, "abort_after": draw.randrange(1, len(token_ids) + 1)}
            steps = draw.choice(((1,), (1, 3, 2), (5,), (1, 1, 8)))
            forced = ForcedAnswer(token_ids=token_ids, step_sizes=steps, **options)
            yield Planted(path, forced, len(before), _num_before(tokenizer, token_ids, len(before)))

    async def leaks(self, count: int, tick: Callable[[int], None] = lambda done: None) -> LeakReport:
        """Replay planted violations, and count what of them reaches a client."""
        report = LeakReport()
        planted = self.plant(count)
        while batch := list(itertools.islice(planted, AT_ONCE)):
            for each, received in zip(batch, await asyncio.gather(*map(self._replayed, batch)), strict=True):
                self._count(report, each, received)
            tick(report.count)
        return report

    async def _replayed(self, planted: Planted) -> Received:
        forced = planted.forced
        if planted.path == "n = 2":
            clean = ForcedAnswer(token_ids=self._engine.tokenizer.encode("a clean answer"), kind=forced.kind)
            return (await self._engine.replay_several([forced, clean]))[0]
        return await self._engine.replay(forced)

    def _count(self, report: LeakReport, planted: Planted, received: Received) -> None:
        report.count += 1
        report.by_path[planted.path] += 1
        expected = self._engine.tokenizer.decode(planted.forced.token_ids)
        is_prefix = expected.startswith(received.text)
        if received.finish_reason == "content_filter" or not is_prefix:
            report.stopped += 1
        elif received.finish_reason not in ("abort", "stop"):
            report.missed += 1
        tokens = max(len(received.token_ids), len(received.logprob_token_ids)) - planted.num_before
        is_replaced = not is_prefix and received.finish_reason == "length"
        # A replaced answer continues behind the violation; it must not have the violation's tokens.
        leak = 0 if is_replaced else max(0, tokens)
        if not is_replaced and is_prefix and len(received.text) > planted.start and leak == 0:
            leak = 1
        report.max_leak = max(report.max_leak, leak)
        report.leaked += leak > self.window

    async def false_stops(self, count: int, tick: Callable[[int], None] = lambda done: None) -> FalseStops:
        """Judge the clean passages, of ``count``, as whole answers."""
        stopped = done = 0
        texts = filter(self._is_clean, self._passages(count))
        while batch := list(itertools.islice(texts, AT_ONCE)):
            found = await asyncio.gather(*(self._is_changed(text) for text in batch))
            stopped += sum(found)
            done += len(batch)
            tick(done)
        return FalseStops(done, stopped)

    async def _is_changed(self, text: str) -> bool:
        loop, woken = asyncio.get_running_loop(), asyncio.Event()

        def wake() -> None:
            loop.call_soon_threadsafe(woken.set)

        judgment = self._service.begin("answer", "clean", {}, wake)
        # Time does not count here: what is judged late is judged nevertheless.
        limits = self._service.strictness({"instant_guard_late": "wait"}).limits
        answer = GuardedAnswer(self._service, "clean", Window(limits, is_streamed=False), judgment, None, lambda: None)
        answer.add(text, (), (), is_finished=True)
        while (release := answer.take(is_awake=True)) is None:
            await woken.wait()
            woken.clear()
        return release.text != text

    async def cost(self, count: int) -> Cost:
        """Replay clean, streamed answers with and without the guard, in turns."""
        seconds: dict[bool, float] = {True: 0.0, False: 0.0}
        later, gaps, tokens = [], [], 0
        for text in passages(count):
            token_ids = self._engine.tokenizer.encode(text, add_special_tokens=False)
            tokens += len(token_ids)
            firsts = {}
            for guarded, engine in ((True, self._engine), (False, self._baseline)):
                began = time.perf_counter()
                received = await engine.replay(ForcedAnswer(token_ids=token_ids))
                seconds[guarded] += time.perf_counter() - began
                firsts[guarded] = received.arrivals[0] if received.arrivals else received.num_steps
                if guarded:
                    gaps += list(np.diff(received.arrivals))
            later.append(firsts[True] - firsts[False])
        return Cost(
            (seconds[True] - seconds[False]) / tokens,
            seconds[False] / tokens,
            float(np.mean(later)),
            int(np.percentile(gaps, 99)) if gaps else 0,
        )


def _num_before(tokenizer: Any, token_ids: Sequence[int], start: int) -> int:
    """The number of leading tokens whose text ends at or before a position."""
    low, high = 0, len(token_ids)
    while low < high:
        middle = (low + high + 1) // 2
        if len(tokenizer.decode(token_ids[:middle]).rstrip("\ufffd")) <= start:
            low = middle
        else:
            high = middle - 1
    return low


_PATHS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("streamed", {}),
    ("whole", {"kind": "FINAL_ONLY"}),
    ("cumulative", {"kind": "CUMULATIVE"}),
    ("log probabilities, streamed", {"logprobs": 2}),
    ("log probabilities, whole", {"logprobs": 2, "kind": "FINAL_ONLY"}),
    ("token ids only", {"detokenize": False}),
    ("n = 2", {}),
    ("stop strings", {"stop": ("\n\n\n\n", "<end>")}),
    ("structured output", {"is_structured": True}),
    ("disconnect", {}),
)
