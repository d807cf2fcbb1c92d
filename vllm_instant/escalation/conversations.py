"""Which conversations have had a deep answer, so that they stay deep."""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

MAX_CONVERSATIONS = 10_000
"""Number of the newest deep answers that are remembered."""
MAX_MESSAGES = 512
"""Messages of a request, up to the newest, behind which an earlier request may have ended."""


class DeepConversations:
    """Remembers by digests of messages. A later request of a conversation begins with an earlier one's messages.

    The client's answer messages are not compared, because clients may cut or change them: two conversations of one
    tenant that begin with the same messages count as one.
    """

    def __init__(self, max_conversations: int = MAX_CONVERSATIONS) -> None:
        self._max = max_conversations
        self._deep: OrderedDict[bytes, None] = OrderedDict()

    def remember(self, tenant: str, body: Mapping[str, Any]) -> None:
        """Note that a request gets a deep answer."""
        digests = _digests(tenant, body)
        if not digests:
            return
        self._deep[digests[-1]] = None
        self._deep.move_to_end(digests[-1])
        while len(self._deep) > self._max:
            self._deep.popitem(last=False)

    def is_deep(self, tenant: str, body: Mapping[str, Any]) -> bool:
        """Whether an earlier request of the conversation got a deep answer."""
        digests = _digests(tenant, body)
        # Without tool calls behind it the newest user message begins a new request, not the rest of an earlier one.
        earlier = digests[:-1] if digests and _role(body["messages"][-1]) == "user" else digests
        found = next((digest for digest in earlier if digest in self._deep), None)
        if found is None:
            return False
        self._deep.move_to_end(found)
        return True


def _role(message: Any) -> Any:
    return message.get("role") if isinstance(message, Mapping) else None


def _digests(tenant: str, body: Mapping[str, Any]) -> list[bytes]:
    """The digests of a chat's messages up to each user message, answers left out."""
    messages = body.get("messages")
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        return []
    running = hashlib.sha256(tenant.encode())
    digests: list[bytes] = []
    for message in messages:
        role = _role(message)
        if role not in ("system", "developer", "user"):
            continue
        running.update(json.dumps([role, message.get("content")], sort_keys=True).encode())
        if role == "user":
            digests.append(running.digest())
    return digests[-MAX_MESSAGES:]
