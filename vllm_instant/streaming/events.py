"""The events that clients send, in the style of OpenAI's realtime API, and their validation."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from vllm_instant.deployment.errors import choices, shown


class EventError(Exception):
    """An event that is not valid, with a message for the client.

    Attributes:
        code: Machine-readable kind of the error.
        event_id: The client's id of the event, if any.
        status: The corresponding HTTP status.

    """

    def __init__(
        self, message: str, code: str = "invalid_event", event_id: str | None = None, status: int = 400
    ) -> None:
        super().__init__(message)
        self.code = code
        self.event_id = event_id
        self.status = status


class _Event(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    event_id: str | None = Field(None, max_length=512)


class UpdateSession(_Event):
    """Set the request except for the text that is being typed."""

    type: Literal["session.update"]
    session: dict[str, Any]
    """A chat-completions body that replaces the previous one; ``messages`` are the system prompt and earlier turns."""


class AppendText(_Event):
    """Append text."""

    type: Literal["input_text.append"]
    text: str


class ReplaceText(_Event):
    """Replace the characters ``start:end`` by ``text``; without ``end``, all from ``start``."""

    type: Literal["input_text.replace"]
    start: int = Field(ge=0, strict=True)
    end: Annotated[int, Field(ge=0, strict=True)] | None = None
    text: str = ""


class ClearText(_Event):
    """Delete the text."""

    type: Literal["input_text.clear"]


class Commit(_Event):
    """Commit the prompt, which starts the answer."""

    type: Literal["input_text.commit"]


class CancelResponse(_Event):
    """Abort the answer."""

    type: Literal["response.cancel"]


ClientEvent = UpdateSession | AppendText | ReplaceText | ClearText | Commit | CancelResponse
_ADAPTER: TypeAdapter[ClientEvent] = TypeAdapter(Annotated[ClientEvent, Field(discriminator="type")])
TYPES = (
    "session.update",
    "input_text.append",
    "input_text.replace",
    "input_text.clear",
    "input_text.commit",
    "response.cancel",
)


def parse(frame: str | bytes) -> ClientEvent:
    """Return the event of a frame.

    Raises:
        EventError: The frame is not a valid event.

    """
    return check(loads(frame, "frame"))


def loads(text: str | bytes, name: str) -> Any:
    """Return parsed JSON; ``name`` is the word for the text in messages.

    Raises:
        EventError: The text is not JSON, or holds half of a surrogate pair, which no tokenizer can encode.

    """
    try:
        found = json.loads(text)
        # Only an escape can make half of a pair: encoded text has none. Writing the whole again is rarely needed.
        if (b"\\ud" if isinstance(text, bytes) else "\\ud") in text.lower():  # type: ignore[operator]
            json.dumps(found, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise EventError(f"the {name} has half of a surrogate pair: cut text between characters") from None
    except ValueError as error:  # UnicodeDecodeError is one
        raise EventError(f"the {name} is not JSON: {error}", "invalid_json") from None
    except RecursionError:
        raise EventError(f"the {name} is JSON nested too deeply", "invalid_json") from None
    return found


def check(found: Any) -> ClientEvent:
    """Return the event of parsed JSON; raises ``EventError``."""
    if not isinstance(found, dict):
        raise EventError(f"an event is a JSON object with a type; found {shown(found)}")
    event_id = found.get("event_id") if isinstance(found.get("event_id"), str) else None
    kind = found.get("type")
    if kind not in TYPES:
        name = kind if isinstance(kind, str) else ""
        raise EventError(f"there is no event type {shown(kind)}; {choices(name, TYPES)}", "unknown_type", event_id)
    try:
        return _ADAPTER.validate_python(found)
    except ValidationError as error:
        detail = error.errors()[0]
        key = ".".join(str(part) for part in detail["loc"][1:])
        message = str(detail["msg"])
        raise EventError(f"{kind}: {key}: {message[:1].lower()}{message[1:]}", event_id=event_id) from None
