"""The one mask for secrets: in every value, word, address and text that is shown, stored or sent to others."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from vllm_instant.interfaces.deployment import Deployment

MASK = "***"
_SECRET = re.compile(
    r"(api[-_]?keys?|password|passwd|secret|credential|(?<!per_)token|ssl[-_]?keyfile|authorization)$", re.I
)
_USER_INFO = re.compile(r"(?<=://)[^/\s'\"@]+(?=@)")
"""What stands between ``//`` and ``@`` of an address: a user's name and password."""
_TEXT = re.compile(
    r"""(?P<before>[\w.-]*?(?:api[-_]?keys?|password|passwd|secret|credential|token|ssl[-_]?keyfile|authorization)["']?\s*[=:]\s*)"""
    r"""(?P<value>\[[^\]]*\]|"(?:[^"\\]|\\.)*"|'[^']*'|[^\s,}#'"]+)""",
    re.I,
)
"""An assignment to a secret key in TOML, JSON or ``key=value``."""


def is_secret(key: str) -> bool:
    """Whether values under this key, option or variable must not be shown."""
    return _SECRET.search(key.lstrip("-")) is not None


def masked(value: Any, key: str = "") -> Any:
    """A value of JSON types with all secrets replaced, at any depth; ``key`` is what it stands under."""
    if is_secret(key) and value not in (None, "", False, True) and not isinstance(value, Mapping):
        return [MASK for _ in value] if isinstance(value, list | tuple) else MASK
    if isinstance(value, Mapping):
        return {name: masked(inner, str(name)) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [masked(inner) for inner in value]
    return _USER_INFO.sub(MASK, value) if isinstance(value, str) else value


def masked_deployment(deployment: Deployment) -> dict[str, Any]:
    """A deployment as JSON types, for others to read."""
    plain: dict[str, Any] = masked(deployment.model_dump(mode="json"))
    return plain


def masked_words(words: Sequence[str]) -> list[str]:
    """Words of a command line: the values of options that hold secrets, and users in addresses, replaced."""
    found: list[str] = []
    hidden = False
    for word in words:
        option = word.startswith("-")
        # An option may take several values: all words up to the next option are hidden.
        hidden = hidden and not option
        name, equals, value = word.partition("=")
        if hidden:
            found.append(MASK)
        elif equals and is_secret(name):
            found.append(f"{name}={MASK}")
        elif equals and option:
            found.append(f"{name}={masked_text(value)}")
        else:
            found.append(masked_text(word))
        if option:
            hidden = not equals and is_secret(word)
    return found


def masked_text(text: str) -> str:
    """A text, as of a deployment file, with assignments to secret keys and users in addresses replaced."""
    return _USER_INFO.sub(MASK, _TEXT.sub(lambda match: f'{match["before"]}"{MASK}"', text))
