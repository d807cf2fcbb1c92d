"""The answers of a server to the requests of the table "same answers", and how two of them differ."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
from request_features import Feature

from vllm_instant.tools.measure.http_client import sync_client

CLIENTS, TIMEOUT = 4, 120.0
Answers = dict[str, Any]


def answer(client: httpx.Client, feature: Feature, drafts: int | None) -> Any:
    """Status and content of one answer, as they are to be compared."""
    body = feature.request("demo", drafts)
    if feature.path == "/inference/v1/generate":
        body.pop("model")
    try:
        if not body.get("stream"):
            response = client.post(feature.path, json=body)
            found = _content(response) if response.status_code == 200 else _error(response)
            return {"status": response.status_code, "answer": found}
        events = []
        with client.stream("POST", feature.path, json=body) as response:
            for line in response.iter_lines():
                if line.startswith("data: {"):
                    events.append(json.loads(line.removeprefix("data: ")))
        return {"status": response.status_code, "answer": joined(events)}
    except httpx.HTTPError as error:
        return {"status": 0, "answer": f"{type(error).__name__}: {error}"}


def _content(response: httpx.Response) -> Any:
    try:
        return plain(response.json())
    except ValueError:
        return response.text[:300]


def _error(response: httpx.Response) -> str:
    """The message of an error without ids."""
    return re.sub(r"[0-9a-f]{16,}", "ID", response.text)[:300]


def answers(url: str, features: Sequence[Feature], drafts: int | None = None, clients: int = CLIENTS) -> Answers:
    """All answers of a server, by the names of the features, a few at a time."""
    together = [feature for feature in features if not feature.is_alone]
    with sync_client(url, timeout=TIMEOUT) as client, ThreadPoolExecutor(clients) as pool:
        answered = pool.map(lambda feature: answer(client, feature, drafts), together)
        found = {feature.name: one for feature, one in zip(together, answered, strict=True)}
        found |= {feature.name: answer(client, feature, drafts) for feature in features if feature.is_alone}
    return found


VOLATILE = {"id", "created", "created_at", "metrics", "system_fingerprint", "request_id", "prompt_tokens_details"}
VOLATILE |= {"input_tokens_details", "completed_at", "item_id", "call_id", "kv_transfer_params"}


EXCLUDED = -9999.0
"""VLLM's log-probability of a token that is not allowed. Which of these is named is chance."""


def plain(answer: Any) -> Any:
    """An answer without what differs between two equal requests."""
    if isinstance(answer, Mapping):
        return {key: plain(value) for key, value in answer.items() if key not in VOLATILE and value != EXCLUDED}
    if isinstance(answer, list):
        return [plain(item) for item in answer if not (isinstance(item, Mapping) and item.get("logprob") == EXCLUDED)]
    return answer


def joined(events: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """A streamed answer as one: the texts, tool arguments and logprobs of each choice, and the last usage."""
    choices: dict[str, dict[str, Any]] = {}
    usage = None
    for event in events:
        usage = event.get("usage") or usage
        for choice in event.get("choices") or []:
            found = choices.setdefault(str(choice["index"]), {"text": "", "tools": {}, "logprobs": [], "token_ids": []})
            delta = choice.get("delta") or {}
            found["text"] += choice.get("text") or delta.get("content") or ""
            found["reasoning"] = found.get("reasoning", "") + (delta.get("reasoning") or "")
            for call in delta.get("tool_calls") or []:
                function = call.get("function") or {}
                tool = found["tools"].setdefault(str(call["index"]), {"name": "", "arguments": ""})
                tool["name"] += function.get("name") or ""
                tool["arguments"] += function.get("arguments") or ""
            logprobs = choice.get("logprobs") or {}
            found["logprobs"] += logprobs.get("tokens") or [one["token"] for one in logprobs.get("content") or []]
            found["token_ids"] += choice.get("token_ids") or []
            found |= {key: choice[key] for key in ("finish_reason", "stop_reason") if choice.get(key) is not None}
    return {"choices": choices, "usage": plain(usage)}


def difference(ours: Any, theirs: Any, path: str = "") -> str | None:
    """Where two answers differ first; None where they are the same. Floats may differ by rounding (2e-3)."""
    if isinstance(ours, float) and isinstance(theirs, float | int):
        same = math.isclose(ours, theirs, rel_tol=1e-3, abs_tol=2e-3)
        return None if same else f"{path}: {ours} instead of {theirs}"
    if isinstance(ours, Mapping) and isinstance(theirs, Mapping) and ours.keys() == theirs.keys():
        pairs: Iterator[tuple[Any, Any, Any]] = ((key, ours[key], theirs[key]) for key in ours)
        return next(filter(None, (difference(mine, other, f"{path}.{key}") for key, mine, other in pairs)), None)
    if isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        each = (difference(*pair, f"{path}[{i}]") for i, pair in enumerate(zip(ours, theirs, strict=True)))
        return next(filter(None, each), None)
    return None if ours == theirs else f"{path}: {str(ours)[:200]!r} instead of {str(theirs)[:200]!r}"
