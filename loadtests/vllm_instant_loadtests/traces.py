"""Recorded traffic with lengths: when requests came, how long prompts and answers were, and which prefixes they shared.

Formats, recognized by their contents:

* Mooncake (also as extended by AIPerf): JSON lines with ``timestamp`` (ms), ``input_length``, ``output_length`` and
  ``hash_ids``, one per block of 512 prompt tokens; with ``session_id`` and ``delay`` (ms) also conversations.
* Azure LLM inference traces: CSV with ``TIMESTAMP``, ``ContextTokens``, ``GeneratedTokens``.
* BurstGPT: CSV with ``Timestamp``, ``Request tokens``, ``Response tokens``, and sessions where it has them.
* OpenTelemetry spans with the GenAI attributes, as OTLP JSON.
* guidellm's ``benchmarks.json`` and AIPerf's ``profile_export.jsonl``: what they sent, for sending it again.

Where a format has sessions and the ends of answers, a request waits for the answers that had ended before it began and
were the newest, with the recorded pause: a chain is a conversation, overlapping requests are parallel calls.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

MOONCAKE_BLOCK = 512
"""Prompt tokens per entry of Mooncake's ``hash_ids``."""


class TraceError(ValueError):
    """A trace cannot be used; the message is one sentence."""


@dataclass(frozen=True)
class TraceRequest:
    """One recorded request."""

    at: float
    """Seconds after the first one."""
    input_tokens: int
    output_tokens: int
    hash_ids: tuple[int, ...] = ()
    """One per block of prompt tokens; equal prefixes have equal ids."""
    session: str = ""
    ended: float | None = None
    """When its answer had ended, on the clock of ``at``."""
    after: tuple[int, ...] = ()
    """Places in the trace of the requests of its session whose answers it waits for."""
    pause: float = 0.0
    """Seconds between the last of these answers and this request."""
    text: str = ""
    """The prompt, where the trace has it."""


def read_trace(file: Path) -> list[TraceRequest] | None:
    """The requests of a trace in the order of time; None for a file with arrival times only.

    Raises:
        TraceError: in one sentence, where the format is none of those above, or an entry is incomplete.

    """
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise TraceError(f"{file} cannot be read: {error}") from None
    reader = _reader(text, file)
    if reader is None:
        return None
    try:
        found = [one for one in reader(text) if one.input_tokens > 0 and one.output_tokens > 0]
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        what = f"{error.args[0]} is missing" if isinstance(error, KeyError) else str(error)
        raise TraceError(f"{file} has an entry that cannot be read: {what}") from None
    if not found:
        raise TraceError(f"{file} has no request with prompt and answer tokens")
    first = min(one.at for one in found)
    shifted = [replace(one, at=one.at - first, ended=None if one.ended is None else one.ended - first) for one in found]
    return _linked(sorted(shifted, key=lambda one: one.at))


def prefix_share(requests: Sequence[TraceRequest], block: int = MOONCAKE_BLOCK) -> float:
    """Share of prompt tokens in blocks that an earlier request had as part of the same prefix; NaN without hashes.

    An endless prefix cache that is asked in this order would have this hit rate.
    """
    seen: set[int] = set()
    total = known = 0
    for one in requests:
        total += one.input_tokens
        hits = next((place for place, block_id in enumerate(one.hash_ids) if block_id not in seen), len(one.hash_ids))
        known += min(hits * block, one.input_tokens)
        seen.update(one.hash_ids)
    return known / total if total and seen else float("nan")


def _reader(text: str, file: Path) -> Callable[[str], Iterator[TraceRequest]] | None:
    start = text.lstrip()[:1]
    if start == "{":
        try:
            first = json.loads(text.lstrip().splitlines()[0])
        except ValueError:
            first = _whole(text, file)
        for key, reader in _JSON_READERS.items():
            if key in first:
                return reader
        raise TraceError(f"{file} is JSON without {', '.join(_JSON_READERS)}, one of which a trace has")
    header = text.split("\n", 1)[0].lower()
    if "contexttokens" in header and "generatedtokens" in header:
        return _azure
    if "request tokens" in header and "response tokens" in header:
        return _burstgpt
    if start == "[" or any(letter.isalpha() for letter in header.split("#")[0]):
        raise TraceError(
            f"{file} should be one arrival time per line, or a trace of Mooncake, Azure, BurstGPT, OpenTelemetry, "
            "guidellm or AIPerf"
        )
    return None


def _whole(text: str, file: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(text))
    except ValueError as error:
        raise TraceError(f"{file} is no JSON: {error}") from None


def _lines(text: str) -> Iterator[dict[str, Any]]:
    return (json.loads(line) for line in text.splitlines() if line.strip())


def _mooncake(text: str) -> Iterator[TraceRequest]:
    times: dict[str, float] = {}
    for line in _lines(text):
        session = str(line.get("session_id") or "")
        # Later turns of AIPerf's sessions have a delay after the previous answer instead of a time.
        delay = line.get("delay")
        at = float(line["timestamp"]) / 1e3 if line.get("timestamp") is not None else times.get(session, 0.0)
        times[session] = at
        yield TraceRequest(
            at,
            int(line["input_length"]),
            int(line["output_length"]),
            tuple(int(block) for block in line.get("hash_ids") or ()),
            session,
            pause=float(delay) / 1e3 if delay is not None else 0.0,
            text=str(line.get("text_input") or ""),
        )


def _azure(text: str) -> Iterator[TraceRequest]:
    for row in csv.DictReader(io.StringIO(text)):
        # Fractions have seven digits, one more than Python reads.
        date, _, fraction = row["TIMESTAMP"].strip().partition(".")
        digits = "".join(letter for letter in fraction.split("+")[0] if letter.isdigit())
        at = datetime.fromisoformat(date.split("+")[0]).timestamp() + float(f"0.{digits or 0}")
        yield TraceRequest(at, int(row["ContextTokens"]), int(row["GeneratedTokens"]))


def _burstgpt(text: str) -> Iterator[TraceRequest]:
    for row in csv.DictReader(io.StringIO(text)):
        at, took = float(row["Timestamp"]), row.get("Elapsed time")
        yield TraceRequest(
            at,
            int(row["Request tokens"]),
            int(row["Response tokens"]),
            session=(row.get("Session ID") or "").strip(),
            ended=at + float(took) if took else None,
        )


def _opentelemetry(text: str) -> Iterator[TraceRequest]:
    exports = [json.loads(text)] if text.count("\n") and not _is_lines(text) else list(_lines(text))
    for export in exports:
        for resource in export["resourceSpans"]:
            for scope in resource.get("scopeSpans", ()):
                for span in scope.get("spans", ()):
                    values = {entry["key"]: _value(entry["value"]) for entry in span.get("attributes", ())}
                    read = values.get("gen_ai.usage.input_tokens", values.get("gen_ai.usage.prompt_tokens"))
                    wrote = values.get("gen_ai.usage.output_tokens", values.get("gen_ai.usage.completion_tokens"))
                    # Spans of agents and workflows sum up the calls inside of them.
                    if read is None or wrote is None or values.get("gen_ai.operation.name") == "invoke_agent":
                        continue
                    yield TraceRequest(
                        int(span["startTimeUnixNano"]) / 1e9,
                        int(read),
                        int(wrote),
                        session=str(values.get("gen_ai.conversation.id") or span.get("traceId", "")),
                        ended=int(span["endTimeUnixNano"]) / 1e9,
                    )


def _is_lines(text: str) -> bool:
    try:
        json.loads(text.lstrip().splitlines()[0])
    except ValueError:
        return False
    return True


def _value(value: Mapping[str, Any]) -> Any:
    return next(iter(value.values()), None)


def _guidellm(text: str) -> Iterator[TraceRequest]:
    for benchmark in json.loads(text)["benchmarks"]:
        for request in benchmark["requests"]["successful"]:
            began = request.get("request_start_time", request.get("start_time"))
            yield TraceRequest(float(began), int(request["prompt_tokens"]), int(request["output_tokens"]))


def _aiperf(text: str) -> Iterator[TraceRequest]:
    for line in _lines(text):
        about, metrics = line["metadata"], line.get("metrics") or {}
        if line.get("error") or "output_sequence_length" not in metrics:
            continue
        yield TraceRequest(
            int(about["request_start_ns"]) / 1e9,
            int(metrics["input_sequence_length"]["value"]),
            int(metrics["output_sequence_length"]["value"]),
            session=str(about.get("x_correlation_id") or about.get("conversation_id") or ""),
            ended=int(about["request_end_ns"]) / 1e9,
        )


_JSON_READERS: dict[str, Callable[[str], Iterator[TraceRequest]]] = {
    "input_length": _mooncake,
    "resourceSpans": _opentelemetry,
    "benchmarks": _guidellm,
    "metadata": _aiperf,
}
"""By a key of the file, or of its first line."""


def _linked(requests: Sequence[TraceRequest]) -> list[TraceRequest]:
    """The requests with what each one waits for."""
    by_session: dict[str, list[int]] = {}
    linked = []
    for place, one in enumerate(requests):
        before = by_session.setdefault(one.session, []) if one.session else []
        linked.append(_after(one, before, requests))
        before.append(place)
    return linked


def _after(one: TraceRequest, before: Sequence[int], requests: Sequence[TraceRequest]) -> TraceRequest:
    if not before:
        return replace(one, pause=0.0)
    if one.ended is None or any(requests[place].ended is None for place in before):
        return replace(one, after=(before[-1],))
    ended = [place for place in before if (requests[place].ended or 0.0) <= one.at]
    # The newest answers: none of them had ended before another one of them began.
    newest_begin = max((requests[place].at for place in ended), default=0.0)
    parents = tuple(place for place in ended if (requests[place].ended or 0.0) > newest_begin)
    pause = one.at - max((requests[place].ended or 0.0 for place in parents), default=one.at)
    return replace(one, after=parents, pause=pause)
