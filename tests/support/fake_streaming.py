"""An engine for streaming sessions that only remembers what it was asked, and tokenizers for it."""

from __future__ import annotations

import asyncio
import functools
import inspect
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from prometheus_client import CollectorRegistry
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from vllm_instant.deployment.circuit_breaker import GuardedPlugin
from vllm_instant.interfaces.streaming import EngineLoad, PinLimits, SessionLimits, StreamingPrefill
from vllm_instant.streaming.engine import CommitFlag, Prompt, RequestError
from vllm_instant.streaming.metrics import StreamingMetrics
from vllm_instant.streaming.session_manager import SessionManager
from vllm_instant.tools.demo.assets import ASSETS

CONTRACTIONS_AND_NUMBERS = "|".join(
    (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    )
)
"""How several families of models split text before they merge."""


@functools.cache
def tokenizers_by_kind() -> dict[str, Tokenizer]:
    """The demo's tokenizer, and two small ones that normalise and split in other ways."""
    sample = [inspect.getsource(module)[:20_000] for module in (asyncio.tasks, functools, inspect)]
    sample.append("é ñ 1234567 नमस्ते שלום")
    split = Tokenizer(models.BPE())
    split.normalizer = normalizers.NFC()
    split.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(CONTRACTIONS_AND_NUMBERS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    split.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    split.train_from_iterator(sample, trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet))
    words = Tokenizer(models.Unigram())
    words.normalizer = normalizers.NFKC()
    words.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=400, unk_token="<unk>", special_tokens=["<unk>"])
    words.train_from_iterator(sample, trainer)
    demo = Tokenizer.from_file(str(ASSETS / "base" / "tokenizer.json"))
    return {"demo": demo, "split": split, "words": words}


class FakeEngine:
    """Renders with a tokenizer and a template of special tokens; answers with the number of tokens of the prompt.

    Args:
        kind: of tokenizer.
        max_tokens: of a prompt; longer ones are refused.

    """

    block_size = 4

    def __init__(self, kind: str = "demo", max_tokens: int = 100_000) -> None:
        self._tokenizer = tokenizers_by_kind()[kind]
        self._most = max_tokens
        self.running = 0
        self.slots = 8
        self.prefilled: list[list[int]] = []
        self.answered: list[dict[str, Any]] = []
        self.open_answers = 0
        self.at_once = self.max_at_once = self.stopped = 0
        self.answer_gate = asyncio.Event()
        self.answer_gate.set()
        self.holding: list[str] = []
        self.held_for: list[str | None] = []
        self.unsupported_reason: str | None = None
        self.prefill_gate = asyncio.Event()
        self.prefill_gate.set()
        self.hold_gate = asyncio.Event()
        self.hold_gate.set()

    def load(self) -> EngineLoad:
        return EngineLoad(self.running, self.slots)

    def ids(self, request: Mapping[str, Any]) -> list[int]:
        ids = []
        for message in request["messages"]:
            # Markers of the template, numbered below what the tokenizer uses.
            ids += [-1, *self._tokenizer.encode(message["content"], add_special_tokens=False).ids, -2]
        return [*ids, -3]

    async def render(self, request: Mapping[str, Any]) -> Prompt:
        if request.get("model") == "missing":
            raise RequestError("The model `missing` does not exist.", 404)
        ids = self.ids(request)
        if len(ids) > self._most:
            raise RequestError(f"the prompt has {len(ids)} tokens")
        return Prompt(ids)

    async def pin(self, name: str, limits: PinLimits) -> str | None:
        if self.unsupported_reason is None:
            self.holding.append(name)
        await self.hold_gate.wait()
        return self.unsupported_reason

    async def unpin(self, name: str) -> None:
        self.holding.remove(name)

    async def prefill(self, prompt: Prompt, length: int, affinity: int, session: str | None = None) -> None:
        self.held_for.append(session)
        self.at_once += 1
        self.max_at_once = max(self.max_at_once, self.at_once)
        try:
            await asyncio.sleep(0)
            await self.prefill_gate.wait()
            self.prefilled.append(prompt.token_ids[:length])
        except asyncio.CancelledError:
            self.stopped += 1
            raise
        finally:
            self.at_once -= 1

    async def answer(
        self, request: Mapping[str, Any], affinity: int, commit: CommitFlag | None = None, session: str | None = None
    ) -> AsyncIterator[dict[str, Any]]:
        self.held_for.append(session)
        ids = (await self.render(request)).token_ids
        self.open_answers += 1
        self.answered.append(dict(request))
        try:
            yield {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]}
            for word in (f"{len(ids)}", " tokens"):
                await self.answer_gate.wait()
                yield {"choices": [{"index": 0, "delta": {"content": word}}]}
        finally:
            self.open_answers -= 1


class Eager(StreamingPrefill):
    """Reads everything that is settled at once.

    Args:
        pause: before an early answer.
        holds: which sessions hold what they have read.
        **limits: of sessions.

    """

    def __init__(self, pause: float | None = None, holds: PinLimits | None = None, **limits: Any) -> None:
        self._pause = pause
        self._holds = holds
        self._limits = SessionLimits(**limits)

    def next_chunk(self, progress, load):
        return progress.stable_tokens if load.num_running < load.max_num_running else 0

    def pin_limits(self):
        return self._holds

    def speculative_answer_delay(self):
        return self._pause

    def starts_speculative_answer(self, load):
        return load.num_running == 0

    def max_speculative_answer_seconds(self):
        return 0.05

    def session_limits(self):
        return self._limits


@contextmanager
def hosting(engine: FakeEngine, plugin: StreamingPrefill | None = None, **named: Any) -> Iterator[SessionManager]:
    """A host for sessions; inside a running event loop."""
    registry = CollectorRegistry()
    yield SessionManager(
        engine, GuardedPlugin("streaming", "eager", plugin or Eager()), StreamingMetrics(registry), **named
    )
