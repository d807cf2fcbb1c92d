"""``remote`` as a plugin: its options, and how it is built."""

from __future__ import annotations

import os
import ssl
from collections.abc import Iterable
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from pydantic import Field

from vllm_instant import Deployment, DrafterOptions, Plugin, PluginContext
from vllm_instant.remote.protocol import TOKEN_VARIABLE, VERSION, Hello, tokenizer_fingerprint
from vllm_instant_plugins.remote.connection import DraftServerConnection, ServerAddress
from vllm_instant_plugins.remote.drafter import RemoteDrafter
from vllm_instant_plugins.suffix.plugin import SuffixOptions
from vllm_instant_plugins.suffix.plugin import build as build_lookup

LOOPBACK = ("localhost", "127.0.0.1", "::1")


class RemoteOptions(DrafterOptions):
    """Options of ``remote``."""

    num_speculative_tokens: int = Field(
        8, ge=1, le=63, description="Maximum number of draft tokens per request and step."
    )
    url: str | None = Field(None, description="Address of a draft server, `wss://HOST:PORT`; `ws://` without TLS.")
    token: str | None = Field(
        None, description=f"Token of the draft server; better in `token_file` or the variable {TOKEN_VARIABLE}."
    )
    token_file: str | None = Field(None, description="File whose first line is the token.")
    ca_file: str | None = Field(
        None, description="PEM file of the authorities that TLS trusts; the system's if not set."
    )
    allow_unencrypted: bool = Field(
        False, description="Allow `ws://` to another machine, which shows prompts and the token to the network."
    )
    connect_seconds: float = Field(
        5.0, ge=0, description="Seconds for which the start waits for the draft server; later it is tried again."
    )
    client_drafts: bool = Field(
        False, description="Let clients send drafts for their own requests to /v1/instant/draft."
    )
    fallback: Literal["suffix"] | None = Field(
        None, description="Lookup that is used where it is expected to gain more, or nothing has arrived."
    )


def _token(options: RemoteOptions) -> str | None:
    if options.token_file is not None:
        try:
            lines = Path(options.token_file).expanduser().read_text(encoding="utf-8").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"token_file cannot be read: {error}") from None
        return lines[0].strip() or None
    return options.token or os.environ.get(TOKEN_VARIABLE) or None


def _ssl_context(options: RemoteOptions) -> ssl.SSLContext | None:
    if options.url is None or not options.url.startswith("wss://"):
        return None
    try:
        return ssl.create_default_context(cafile=options.ca_file)
    except OSError as error:
        raise ValueError(f"ca_file cannot be read: {error}") from None


def build(options: RemoteOptions, context: PluginContext) -> RemoteDrafter:
    """The drafter, connected if the draft server is there.

    Raises:
        ValueError: The engine has several workers, or the draft server can never be used.

    """
    sizes = context.identity.get("parallel", "1").split("x")
    # Data-parallel engines have a drafter each; the workers of one engine would receive drafts at different times.
    if any(size != "1" for place, size in enumerate(sizes) if place != 2):
        raise ValueError("remote needs an engine with one worker, because drafts arrive at different times elsewhere")
    source = None
    if options.url is not None:
        fingerprint = tokenizer_fingerprint(context.tokenizer) if context.tokenizer else ""
        hello = Hello(VERSION, fingerprint, context.vocab_size)
        address = ServerAddress(options.url, _token(options), _ssl_context(options))
        source = DraftServerConnection(address, hello, context.num_speculative_tokens)
        reason = source.start(options.connect_seconds)
        if reason is not None:
            source.close()
            raise ValueError(f"the draft server {urlsplit(options.url).netloc} cannot be used: {reason}")
    fallback = build_lookup(SuffixOptions(), context) if options.fallback is not None else None
    return RemoteDrafter(source, context.vocab_size, context.num_speculative_tokens, fallback)


def validate(deployment: Deployment) -> Iterable[str]:
    """The drafter needs a source of drafts, and an address to which prompts may be sent."""
    choice = deployment.slots["drafter"]
    if choice.plugin != PLUGIN.name:
        return
    options = RemoteOptions.model_validate(choice.options)
    if options.url is None:
        if not options.client_drafts:
            yield "[drafter] remote needs url, or client_drafts = true"
        return
    parts = urlsplit(options.url)
    if parts.scheme not in ("ws", "wss") or not parts.hostname or parts.username is not None:
        yield f"[drafter] url must be wss://HOST:PORT or ws://HOST:PORT, found {parts.scheme}://{parts.hostname or ''}"
    elif parts.scheme == "ws" and parts.hostname not in LOOPBACK and not options.allow_unencrypted:
        yield (
            f"[drafter] url = ws://{parts.hostname} would send prompts and the token without encryption: "
            "use wss://, or set allow_unencrypted = true"
        )


PLUGIN = Plugin(
    slot="drafter",
    name="remote",
    summary="drafts of a draft server or of the client's own device, used if they have arrived; steps never wait",
    options=RemoteOptions,
    build=build,
    confident=True,
)
