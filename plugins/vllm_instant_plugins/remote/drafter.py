"""``RemoteDrafter``: drafts that have arrived and fit; a step never waits for one.

The network has a thread of its own (``connection``), which publishes what has arrived. A step hands the thread the new
tokens, reads the branches of each request, and takes the one that continues its tokens. Drafts are verified as certain
proposals, so that a wrong or hostile draft costs the verification of its tokens, and nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from vllm_instant import Draft, DraftRequest
from vllm_instant.interfaces.drafter import FollowingDrafter, PushedTail
from vllm_instant.remote.protocol import MAX_AHEAD, Tail
from vllm_instant_plugins.remote.ages import AgeCalibrator, RequestRecord
from vllm_instant_plugins.remote.branches import Branch, Continuation, RequestBranches, continuation
from vllm_instant_plugins.suffix.calibration import count_accepted
from vllm_instant_plugins.suffix.drafter import SuffixDrafter

MIN_SURVIVAL = 0.05
"""A draft ends before the probability that all of it is accepted falls below this."""
MAX_MISSES = 32
"""Steps in a row without a draft that fits, or a step without a budget, after which the server is told of new tokens"""
MAX_UNTOLD = 8
"""only when a request has this number of them: messages of every step are worth their time only if drafts are used."""
NOTHING = Draft([], [])


class NewTokens(NamedTuple):
    """Tokens of a request that its draft server has not been told of."""

    request_id: str
    cache_salt: str
    position: int
    """Number of tokens that it was told of; 0 for a new request."""
    tokens: list[int]


class DraftSource(Protocol):
    """A connection to a draft server."""

    @property
    def published(self) -> Mapping[str, Sequence[Branch]]:
        """The branches that have arrived, by request."""
        ...

    def advance(self, news: Sequence[NewTokens], ended: Sequence[str]) -> None:
        """Tell the server of new tokens and of requests that have ended; returns at once."""
        ...


class _Compared(NamedTuple):
    """A draft that is compared with the tokens that follow."""

    position: int
    tokens: Sequence[int]
    cells: list[int]
    calibrator: AgeCalibrator


@dataclass(slots=True)
class _Live:
    """What is known of a live request."""

    num_told: int = 0
    """Number of tokens that the draft server was told of."""
    num_misses: int = 0
    """Number of steps in a row without a draft that fits."""
    record: RequestRecord = field(default_factory=RequestRecord)
    compared: _Compared | None = None
    arrived: Sequence[PushedTail] = ()
    """Tails from the client's own device."""
    pushed: RequestBranches | None = None
    """Branches of these; positions count output tokens."""
    of_client: AgeCalibrator | None = None
    """Of these alone: what one client sends must not change what another one is granted."""


class RemoteDrafter(FollowingDrafter):
    """Takes drafts from a draft server, from clients, and from a lookup where that is expected to gain more.

    Args:
        source: Connection to the draft server; None without one.
        vocab_size: Number of token ids.
        max_draft_tokens: Maximum number of draft tokens per request and step.
        fallback: The lookup; None without one.

    """

    def __init__(
        self, source: DraftSource | None, vocab_size: int, max_draft_tokens: int, fallback: SuffixDrafter | None = None
    ) -> None:
        self._source = source
        self._vocab_size = vocab_size
        self._max_draft_tokens = max_draft_tokens
        self._fallback = fallback
        self._live: dict[str, _Live] = {}
        self._of_server = AgeCalibrator()

    def enter(self, request: DraftRequest) -> None:
        """Let the draft server read the prompt while the target does."""
        self._tell([request])

    def propose(self, requests: Sequence[DraftRequest]) -> list[Draft]:
        """What has arrived and fits; nothing for requests whose ``max_draft_tokens`` is 0."""
        self._tell(requests)
        drafts = [self._propose(request) for request in requests]
        if self._fallback is not None:
            asked = [place for place, request in enumerate(requests) if request.max_draft_tokens]
            lookups = self._fallback.propose([requests[place] for place in asked])
            for place, lookup in zip(asked, lookups, strict=True):
                if _expected(lookup) > _expected(drafts[place]):
                    drafts[place] = lookup
        return drafts

    def _tell(self, requests: Sequence[DraftRequest]) -> None:
        news = []
        for request in requests:
            live = self._live.get(request.request_id)
            if live is None:
                live = self._live[request.request_id] = _Live()
            if self._source is None:
                continue
            if len(request.token_ids) < live.num_told:
                # A streaming session replaced its text.
                self._source.advance((), (request.request_id,))
                live.num_told = 0
            untold = len(request.token_ids) - live.num_told
            is_used = request.max_draft_tokens and live.num_misses < MAX_MISSES
            if untold and (is_used or untold >= MAX_UNTOLD or not live.num_told):
                tokens = request.token_ids[live.num_told :].tolist()
                news.append(NewTokens(request.request_id, request.cache_salt, live.num_told, tokens))
                live.num_told = len(request.token_ids)
        if news and self._source is not None:
            self._source.advance(news, ())

    def receive(self, pushed: Mapping[str, Sequence[PushedTail]]) -> None:
        """Add tails from clients, each to the request of its client."""
        for request_id, tails in pushed.items():
            self._live.setdefault(request_id, _Live()).arrived = tails

    def _propose(self, request: DraftRequest) -> Draft:
        live = self._live[request.request_id]
        if live.compared is not None:
            self._learn(live, live.compared, request)
        # Compared also in a step without drafts: the rates are then known when they are needed.
        limit = request.max_draft_tokens or self._max_draft_tokens
        found: tuple[Continuation, AgeCalibrator] | None = None
        if self._source is not None:
            of_server = continuation(self._source.published.get(request.request_id, ()), request.token_ids, limit)
            found = None if of_server is None else (of_server, self._of_server)
            live.num_misses = 0 if found is not None else live.num_misses + 1
        if live.arrived or live.pushed is not None:
            of_client = self._from_client(live, request, limit)
            if of_client is not None and (found is None or len(of_client.tokens) > len(found[0].tokens)):
                live.of_client = live.of_client or AgeCalibrator()
                found = of_client, live.of_client
        if found is None:
            return NOTHING
        tokens, confidence = self._calibrated(live, len(request.token_ids), *found)
        return Draft(tokens, confidence) if request.max_draft_tokens else NOTHING

    def _from_client(self, live: _Live, request: DraftRequest, limit: int) -> Continuation | None:
        output = request.token_ids[request.num_prompt_tokens :]
        if live.pushed is None:
            live.pushed = RequestBranches((), MAX_AHEAD, self._vocab_size)
        live.pushed.commit(output[len(live.pushed.tokens) :].tolist(), MAX_AHEAD)
        for tail in live.arrived:
            place = (tail.branch, tail.base, tail.position, tail.seen)
            live.pushed.add(Tail(0, *place, list(tail.tokens), tail.probabilities))
        live.arrived = ()
        return continuation(live.pushed.published, output, limit)

    def _calibrated(
        self, live: _Live, position: int, draft: Continuation, calibrator: AgeCalibrator
    ) -> tuple[Sequence[int], list[float]]:
        """The tokens that are worth proposing, with their confidence; remembers them for comparison."""
        cells = calibrator.cells(draft.ages, draft.probabilities)
        live.compared = _Compared(position, draft.tokens, cells, calibrator)
        rates, factor = calibrator.rates, live.record.factor
        survival, confidence = 1.0, []
        for cell in cells:
            rate = rates[cell] * factor
            if rate > 1.0:
                rate = 1.0
            survival *= rate
            if survival < MIN_SURVIVAL:
                break
            confidence.append(rate)
        return draft.tokens[: len(confidence)], confidence

    def _learn(self, live: _Live, compared: _Compared, request: DraftRequest) -> None:
        live.compared = None
        sampled = request.token_ids[compared.position :].tolist()
        num_compared, num_accepted = count_accepted(compared.tokens, sampled)
        if num_compared:
            cells, rates = compared.cells[:num_compared], compared.calibrator.rates
            live.record.observe(sum(rates[cell] for cell in cells), num_accepted)
            compared.calibrator.observe(cells, num_accepted)

    def forget(self, request_id: str) -> None:
        """Drop a request that ended."""
        if self._live.pop(request_id, None) is not None and self._source is not None:
            self._source.advance((), (request_id,))
        if self._fallback is not None:
            self._fallback.forget(request_id)


def _expected(draft: Draft) -> float:
    """Expected number of accepted tokens."""
    survival, expected = 1.0, 0.0
    for confidence in draft.confidence:
        survival *= confidence
        expected += survival
    return expected
