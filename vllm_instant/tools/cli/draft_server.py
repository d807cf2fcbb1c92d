"""``vllm-instant draft-server``: draft for engines elsewhere."""

from __future__ import annotations

import asyncio
import logging
import os
import ssl
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vllm_instant.remote.protocol import TOKEN_VARIABLE, VERSION, Hello, tokenizer_fingerprint
from vllm_instant.tools.cli.common import fail, require, working

KEY_VARIABLE = "VLLM_API_KEY"
"""Environment variable that vLLM itself reads as the key of its API."""
MAX_CALLS = 64
"""Maximum number of calls of a served model at the same time."""

if TYPE_CHECKING:
    from websockets.asyncio.server import Server

    from vllm_instant.tools.draft_server.model import DraftModel, TransformersModel
    from vllm_instant.tools.draft_server.served_model import ServedModel


def draft_server(
    model: Annotated[str, typer.Argument(help="Draft model: a folder or a Hugging Face name; the target's tokenizer.")],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 for a free one.")] = 8765,
    token_file: Annotated[
        Path | None,
        typer.Option(help=f"File with the tokens of engines, one per line; {TOKEN_VARIABLE} has one without it."),
    ] = None,
    certificate: Annotated[Path | None, typer.Option(help="PEM file with the certificate, for TLS.")] = None,
    private_key: Annotated[Path | None, typer.Option(help="PEM file with its key.")] = None,
    dtype: Annotated[str, typer.Option(help="Arithmetic of the model, as torch names it; `auto` as stored.")] = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="Number of CPU threads of the model.")] = None,
    vllm: Annotated[
        str | None,
        typer.Option(
            help=f"Address of a vLLM server with this model, which then drafts; its key is in {KEY_VARIABLE}."
        ),
    ] = None,
    max_cached_tokens: Annotated[int, typer.Option(min=1, help="Maximum number of tokens in all KV caches.")] = 65_536,
    max_clients: Annotated[int, typer.Option(min=1, help="Maximum number of connected engines.")] = 16,
    max_requests: Annotated[int, typer.Option(min=1, help="Maximum number of requests.")] = 256,
    max_requests_per_client: Annotated[int, typer.Option(min=1, help="Maximum number of requests per engine.")] = 64,
) -> None:
    """Draft for the requests of engines that serve with the drafter `remote`.

    Engines send token ids and receive token ids. `GET /metrics` has Prometheus metrics. SIGINT and SIGTERM end it.
    """
    require("draft-server", {"torch": "torch", "transformers": "transformers"}, extra="distill")
    from vllm_instant.tools.draft_server.server import Endpoint, is_loopback, read_tokens, run
    from vllm_instant.tools.draft_server.service import DraftServerLimits, DraftService

    tokens = [os.environ[TOKEN_VARIABLE]] if os.environ.get(TOKEN_VARIABLE) else []
    context = None
    try:
        if token_file is not None:
            tokens = read_tokens(token_file)
        if certificate is not None:
            context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
            context.load_cert_chain(certificate, private_key)
    except (ValueError, OSError) as error:
        fail(f"draft-server: {error}")
    if not tokens and not is_loopback(host):
        fail(f"draft-server: --host {host} needs --token-file or the variable {TOKEN_VARIABLE}")
    if tokens and context is None and not is_loopback(host):
        fail(f"draft-server: --host {host} needs --certificate and --private-key, or a proxy that adds TLS on loopback")
    drafting: DraftModel = (
        _load(model, dtype, threads, max_cached_tokens) if vllm is None else _connect(model, vllm, max_requests)
    )
    service = DraftService(
        drafting,
        Hello(VERSION, tokenizer_fingerprint(model), drafting.vocab_size),
        DraftServerLimits(max_clients, max_requests, max_requests_per_client),
    )
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")

    def ready(server: Server) -> None:
        port = server.sockets[0].getsockname()[1]
        print(f"Drafts of {model} at {'wss' if context else 'ws'}://{host}:{port}", flush=True)

    try:
        asyncio.run(run(Endpoint(host, port, tokens, context), service, ready))
    except OSError as error:
        fail(f"draft-server: cannot listen on {host}:{port}: {error}")


def _connect(model: str, url: str, max_parallel: int) -> ServedModel:
    from transformers import AutoConfig

    from vllm_instant.tools.draft_server.model import ModelError
    from vllm_instant.tools.draft_server.served_model import ServedModel

    try:
        vocab_size = int(AutoConfig.from_pretrained(model).get_text_config().vocab_size)
        return ServedModel(url, vocab_size, os.environ.get(KEY_VARIABLE), min(MAX_CALLS, max_parallel))
    except ModelError as error:
        fail(f"draft-server: {error}")
    except (OSError, ValueError) as error:
        fail(f"draft-server: {model} has no configuration: {' '.join(str(error).split())[:300]}")


def _load(model: str, dtype: str, threads: int | None, max_cached_tokens: int) -> TransformersModel:
    import torch

    from vllm_instant.tools.draft_server.model import TransformersModel

    if threads is not None:
        torch.set_num_threads(threads)
    try:
        with working(f"Loading {model} …"):
            return TransformersModel(model, dtype, max_cached_tokens)
    except ValueError as error:
        fail(f"draft-server: {error}")
