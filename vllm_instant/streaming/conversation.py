"""What a session has been told: its request, the earlier turns, and the text of the next prompt."""

from __future__ import annotations

from typing import Any

from vllm_instant.streaming.text import TextBuffer, stable_prefix_length


class Conversation:
    """A request of ``/v1/chat/completions`` whose last message is still being typed.

    Args:
        max_characters: Maximum number of characters of the text.

    """

    def __init__(self, max_characters: int) -> None:
        self.request: dict[str, Any] = {}
        """The request without its messages."""
        self.messages: list[dict[str, Any]] = []
        self.typed = TextBuffer(max_characters)
        self.request_bytes = 0
        """Size of request and messages."""
        self.configured = False
        """Whether the request is known and valid."""
        self.version = 0
        """Version of the request without its last message."""

    def body(self, text: str) -> dict[str, Any]:
        """The request with ``text`` as its last message."""
        return {**self.request, "messages": [*self.messages, {"role": "user", "content": text}]}

    @property
    def stable(self) -> tuple[int, str]:
        """The version, and the text that later text does not change."""
        text = self.typed.text
        return self.version, text[: stable_prefix_length(text)]

    def add_turn(self, text: str, answer: str) -> None:
        """Append a prompt and its answer to the earlier turns."""
        turn = [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
        self.messages = [*self.messages, *turn]
        self.request_bytes += 4 * (len(text) + len(answer))
