"""The ``escalation`` slot: which requests are answered by the deep end, decided before anything is generated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol, runtime_checkable

from pydantic import Field, field_validator

from vllm_instant.interfaces.plugins import PluginOptions


class Depth(StrEnum):
    """The two ends."""

    FAST = "fast"
    """This server, with ``fast_settings``."""
    DEEP = "deep"
    """The server at ``deep_url``, or this one, with ``deep_settings``."""


class EscalationOptions(PluginOptions):
    """Base class of the options of an escalation plugin."""

    deep_url: str | None = Field(
        None, description="Address of an OpenAI-compatible server; without it, this server answers with deep_settings."
    )
    deep_model: str | None = Field(None, description="Name of the model there; by default the one of the request.")
    deep_key_variable: str = Field(
        "DEEP_API_KEY", description="Environment variable with the API key of that server; not sent where it is unset."
    )
    deep_settings: dict[str, Any] = Field(
        {},
        description="Fields of requests that go deep, where the client has not set them: a thinking budget, sampling.",
    )
    fast_settings: dict[str, Any] = Field({}, description="The same for requests that are answered fast.")
    connect_seconds: float = Field(2.0, gt=0, le=60, description="Seconds to connect; then the fast answer is given.")
    first_byte_seconds: float = Field(
        30.0, gt=0, le=3600, description="Seconds until the first part of a stream; then the fast answer is given."
    )
    answer_seconds: float = Field(
        600.0, gt=0, le=36_000, description="Seconds until an answer that is not streamed; then the fast one is given."
    )
    idle_seconds: float = Field(
        60.0, gt=0, le=3600, description="Seconds between two parts of a deep answer, after which it counts as cut off."
    )
    max_failures: int = Field(
        3, ge=1, le=1000, description="Failures in a row after which the deep server is left alone for retry_seconds."
    )
    retry_seconds: float = Field(10.0, gt=0, le=3600, description="Seconds until it is tried again, with one request.")
    sticky: bool = Field(True, description="Whether a conversation stays deep once an answer of it was.")
    client_choice: bool = Field(
        True, description="Whether requests may choose with instant_escalation; otherwise that is refused."
    )
    escalate_stopped: bool = Field(
        False,
        description="Whether the deep end answers where the guard stops a fast answer before the client has read "
        "anything of it.",
    )
    deep_is_guarded: bool = Field(
        False, description="Says that deep_url has a guard of its own, where this server has one."
    )

    @field_validator("deep_url")
    @classmethod
    def _is_address(cls, value: str | None) -> str | None:
        if value is not None and not value.startswith(("http://", "https://")):
            raise ValueError("must begin with http:// or https://")
        return value


@dataclass(frozen=True, kw_only=True)
class EscalationRequest:
    """One request of a client, before it is answered."""

    request_id: str
    path: str
    """``/v1/chat/completions`` or ``/v1/completions``."""
    body: Mapping[str, Any]
    """The JSON that the client sent; must not be changed."""
    prompt: str
    """The text of the prompt: of all messages of a chat, in order; empty for token ids and parts without text."""
    headers: Mapping[str, str] = field(default_factory=dict)
    """By names in lower case; headers with keys are left out."""
    tenant: str = ""
    """A digest of the client's API key; empty without one."""


@dataclass(frozen=True, slots=True)
class Question:
    """A request to this server, at the same path, whose answer decides; it is not streamed."""

    body: Mapping[str, Any]
    timeout_seconds: float = 5.0
    """Time after which there is no answer."""


@dataclass(frozen=True, slots=True)
class Decision:
    """Where a request is answered."""

    depth: Depth
    reason: str
    """A few words without text of the prompt: the client, logs and metrics see them. Few different ones."""
    probability: float | None = None
    """The probability that the deep answer is better, where the plugin estimates it."""


@runtime_checkable
class Escalation(Protocol):
    """Chooses the end that answers a request. Runs in the API server.

    A plugin that fails is not called again: all requests are then answered fast, and marked.
    """

    def decide(self, request: EscalationRequest, answer: Mapping[str, Any] | None) -> Decision | Question:
        """Return the decision, or what this server must be asked before; must return at once.

        Args:
            request: The request.
            answer: None in the first call; then this server's answer to the ``Question``, or an empty mapping where it
                had none. The second call must return a decision.

        """
        ...
