"""Requests of the OpenAI API as plain JSON: their text, the client's choice, settings of an end."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from vllm_instant.interfaces.escalation import Depth

PATHS = ("/v1/chat/completions", "/v1/completions")
"""The paths that are escalated. Answers of the others may refer to state that only one server has."""
ANSWERED_BY = "x-instant-answered-by"
"""Header of answers: the end that answered, a ``Depth``."""
CHOICE = "instant_escalation"
"""The key of ``vllm_xargs`` with which a request chooses."""
CHOICES = (*Depth, "auto")


def prompt_text(body: Mapping[str, Any]) -> str:
    """Return the text of a request's prompt: all messages of a chat, or the prompts of a completion."""
    try:
        return "\n".join(_texts(body["messages"] if "messages" in body else body.get("prompt")))
    except RecursionError:
        return ""  # the API server refuses such a request


def _texts(value: Any) -> Iterator[str]:
    """The texts of messages, of their parts, and of prompts."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)
    elif isinstance(value, Mapping):
        yield from _texts(value["content"] if "content" in value else value.get("text"))


def client_choice(body: Mapping[str, Any], is_allowed: bool) -> Depth | None:
    """Return the end that a request chooses; None for ``auto``.

    Raises:
        ValueError: With one sentence, where the value is not valid or the server lets no request choose.

    """
    extra = body.get("vllm_xargs")
    if not isinstance(extra, Mapping) or CHOICE not in extra:
        return None
    chosen = extra[CHOICE]
    if chosen not in CHOICES:
        raise ValueError(f"{CHOICE} must be one of {', '.join(CHOICES)}, not {chosen!r}")
    if not is_allowed and chosen != "auto":
        raise ValueError(f"this server does not let requests choose with {CHOICE}")
    return None if chosen == "auto" else Depth(chosen)


def with_settings(body: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return a request with an end's settings; what the client has set itself stays."""
    result: dict[str, Any] = dict(body)
    for key, value in settings.items():
        if key not in result or result[key] is None:
            result[key] = value
        elif isinstance(value, Mapping) and isinstance(result[key], Mapping):
            result[key] = with_settings(result[key], value)
    extra = result.get("vllm_xargs")
    if isinstance(extra, Mapping) and CHOICE in extra:
        others = {key: value for key, value in extra.items() if key != CHOICE}
        if others:
            result["vllm_xargs"] = others
        else:
            del result["vllm_xargs"]
    return result
