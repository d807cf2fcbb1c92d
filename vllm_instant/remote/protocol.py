"""The protocol between an engine and whatever drafts for it: messages over a WebSocket (``docs/remote-drafting.md``).

A binary frame is a MessagePack array of messages; a message is an array that begins with its kind. Only token ids
travel, about two bytes each. Whatever one end does, the other end only drops the message or closes the connection.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, TypeVar

import msgspec
from msgspec import Meta

VERSION = 1
SUBPROTOCOL = f"instant-draft.v{VERSION}"
"""WebSocket subprotocol; the server selects it, or the versions differ."""
PATH = "/v1/draft"
"""Path of the WebSocket on a draft server."""
TOKEN_VARIABLE = "DRAFT_SERVER_TOKEN"  # noqa: S105  the name of a variable
"""Environment variable with the token, at both ends, where no file holds it."""

MAX_CONTEXT = 1 << 20
"""Maximum number of tokens of a request."""
MAX_AHEAD = 128
"""Maximum number of tokens that are drafted beyond the committed ones."""
MAX_MESSAGES = 1024
"""Maximum number of messages per frame."""
MAX_SERVER_FRAME = 64 << 10
"""Maximum size in bytes of a frame from a draft server."""
MAX_ENGINE_FRAME = 8 << 20
"""Maximum size in bytes of a frame from an engine, which opens requests with their prompts."""
PROBABILITY_STEPS = 255
"""A probability travels as one byte: 0 for 0, 255 for 1. So there is none that is no number."""

MISMATCH, VIOLATION, OVERLOADED = 4400, 4402, 4429
"""Codes with which a server closes a connection."""

TokenId = Annotated[int, Meta(ge=0, lt=1 << 31)]
Count = Annotated[int, Meta(ge=0, le=MAX_CONTEXT)]
RequestNumber = Annotated[int, Meta(ge=0, lt=1 << 53)]
Ahead = Annotated[int, Meta(ge=0, le=MAX_AHEAD)]
Prefix = Annotated[list[TokenId], Meta(max_length=MAX_CONTEXT)]
Drafted = Annotated[list[TokenId], Meta(min_length=1, max_length=MAX_AHEAD)]
PrefixHash = Annotated[bytes, Meta(max_length=64)]
Probabilities = Annotated[bytes, Meta(max_length=MAX_AHEAD)]
Name = Annotated[str, Meta(max_length=128)]
Reason = Annotated[str, Meta(max_length=300)]


class Message(msgspec.Struct, array_like=True, gc=False, forbid_unknown_fields=True):
    """Base class of all messages."""


class Hello(Message, tag=1):
    """First message of both ends: what must agree."""

    version: int
    fingerprint: Name
    """``fingerprint_of`` the tokenizer; empty where an end has none, which agrees with every other."""
    vocab_size: int
    """Number of token ids of the model; drafts with others are dropped."""


class Open(Message, tag=2):
    """Engine: draft for a new request. After a reconnection all live requests are opened again."""

    request: RequestNumber
    """Unique on this connection, increasing."""
    tokens: Prefix
    """Prompt and committed output so far."""
    ahead: Ahead
    """Number of tokens to draft beyond the committed ones."""
    tenant: Name = ""
    """Hash of the request's ``cache_salt``; caches must not be shared between tenants."""
    prefix: PrefixHash = b""
    """Hash of a prefix that was sent before (``prefixes.block_hashes``); ``tokens`` are those behind it."""


class Committed(Message, tag=3):
    """Engine: the answer has these tokens."""

    request: RequestNumber
    position: Count
    """Index of the first of ``tokens`` in the request: the number of tokens committed before."""
    tokens: Prefix
    ahead: Ahead


class Tail(Message, tag=4):
    """Drafts: the tokens from ``position`` on, if the request continues as this branch has it.

    The tokens of a branch continue the committed prefix of ``base`` tokens, from position ``base`` on without a gap;
    ``position`` is where the branch ended so far. Committed tokens never change, so that ``base`` says for each late
    tail which prefix it belongs to.
    """

    request: RequestNumber
    branch: RequestNumber
    """Increasing within a request."""
    base: Count
    position: Count
    seen: Count
    """Number of committed tokens that were known when this was sent, at least ``base``."""
    tokens: Drafted
    probabilities: Probabilities = b""
    """For each token the drafter's probability in steps of 1/255; empty where it states none."""


class Close(Message, tag=5):
    """Engine: the request has ended."""

    request: RequestNumber


class Declined(Message, tag=6):
    """Server: it drafts nothing for this request."""

    request: RequestNumber
    reason: Reason


class Missing(Message, tag=8):
    """Server: it does not know the prefix with which this request was opened; open it with all of its tokens."""

    request: RequestNumber


class Claim(Message, tag=7):
    """Client of an engine's API server: its drafts under this number are for the request with this key."""

    request: RequestNumber
    key: Name
    """``instant_draft_key`` of the request's ``vllm_xargs``."""


FromEngine = Hello | Open | Committed | Close
FromServer = Hello | Tail | Declined | Missing
FromClient = Hello | Claim | Tail | Close
Kind = TypeVar("Kind")

_TENANT_KEY = secrets.token_bytes(16)
_encoder = msgspec.msgpack.Encoder()
_from_engine = msgspec.msgpack.Decoder(Annotated[list[FromEngine], Meta(max_length=MAX_MESSAGES)])
_from_server = msgspec.msgpack.Decoder(Annotated[list[FromServer], Meta(max_length=MAX_MESSAGES)])
_from_client = msgspec.msgpack.Decoder(Annotated[list[FromClient], Meta(max_length=MAX_MESSAGES)])


class ProtocolError(Exception):
    """The other end sent what the protocol does not allow; the message is one sentence."""


def encode(messages: Iterable[Message]) -> bytes:
    """Return a frame."""
    return _encoder.encode(list(messages))


def read_from_engine(frame: bytes | str) -> list[FromEngine]:
    """Return the messages of an engine's frame; raises ProtocolError."""
    return _read(_from_engine, frame)


def read_from_server(frame: bytes | str) -> list[FromServer]:
    """Return the messages of a server's frame; raises ProtocolError."""
    return _read(_from_server, frame)


def read_from_client(frame: bytes | str) -> list[FromClient]:
    """Return the messages of a frame of an API server's client; raises ProtocolError."""
    return _read(_from_client, frame)


def _read(decoder: msgspec.msgpack.Decoder[list[Kind]], frame: bytes | str) -> list[Kind]:
    if isinstance(frame, str):
        raise ProtocolError("frames are binary")
    try:
        return decoder.decode(frame)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        # Values are not quoted: they are a user's text.
        raise ProtocolError(f"a frame is not valid: {type(error).__name__}") from None


def disagreement(own: Hello, other: Hello) -> str | None:
    """Return in one sentence why two ends cannot work together; None if they can."""
    if own.version != other.version:
        return f"the other end speaks version {other.version} of the protocol, this one {own.version}"
    if own.fingerprint and other.fingerprint and own.fingerprint != other.fingerprint:
        return (
            f"the tokenizers differ (fingerprint {own.fingerprint} here, {other.fingerprint} there): the draft model "
            "must have the tokenizer of the target"
        )
    return None


def fingerprint_of(vocabulary: Mapping[str, int]) -> str:
    """Return the fingerprint of a tokenizer: 16 hexadecimal digits of a hash over its tokens and their ids."""
    digest = hashlib.sha256()
    for token, number in sorted(vocabulary.items(), key=lambda item: (item[1], item[0])):
        digest.update(f"{number} {token}\n".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()[:16]


def tokenizer_fingerprint(tokenizer: str) -> str:
    """Return the fingerprint of a tokenizer by its name or path; empty where it cannot be loaded.

    Code of the model's repository is not run: a tokenizer that needs it has no fingerprint.
    """
    from transformers import AutoTokenizer

    try:
        return fingerprint_of(AutoTokenizer.from_pretrained(tokenizer).get_vocab())
    except Exception:  # transformers raises errors of many kinds for a tokenizer that it does not know
        return ""


def tenant_of(cache_salt: str) -> str:
    """Return the name under which a draft server knows a ``cache_salt``, which may be a secret; new in each process."""
    return hashlib.blake2b(cache_salt.encode(), digest_size=8, key=_TENANT_KEY).hexdigest() if cache_salt else ""


def one_line(text: str) -> str:
    """Return what the other end wrote, for a log: printable and short."""
    return "".join(letter if letter.isprintable() else " " for letter in text[:300])


def to_bytes(probabilities: Sequence[float]) -> bytes:
    """Return probabilities in 0..1 as they travel."""
    return bytes(round(PROBABILITY_STEPS * min(1.0, max(0.0, value))) for value in probabilities)
