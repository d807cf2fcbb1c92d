"""``vllm-instant try-drafter``: how well a drafter predicts a text, without an engine."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError

from vllm_instant.deployment.plugin_manager import plugin_manager
from vllm_instant.interfaces.drafter import Drafter
from vllm_instant.interfaces.plugins import Plugin, PluginContext
from vllm_instant.testing import ContractError
from vllm_instant.tools.cli.common import fail, print_columns, require, working
from vllm_instant.tools.cli.drafter_replay import (
    NgramLookup,
    Replay,
    ReplayedRequest,
    TextError,
    read_requests,
    replay,
    word_tokenizer,
)

BESIDE = ("suffix", "ngram")
"""Drafters that are replayed beside the one that is tried."""


def try_drafter(
    name: Annotated[str, typer.Argument(help="Name of an installed drafter; see `vllm-instant plugins`.")],
    text: Annotated[
        Path,
        typer.Option(
            help="File to replay: text, or .jsonl with `messages`, or `prompt` and `completion`, in each line."
        ),
    ],
    options: Annotated[
        list[str] | None,
        typer.Option("--option", metavar="KEY=VALUE", help="Set an option of the drafter, as in a deployment file."),
    ] = None,
    draft_tokens: Annotated[
        int, typer.Option(min=1, max=128, help="Maximum number of draft tokens per step, for all drafters.")
    ] = 4,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            help="Model (a folder or a Hugging Face name) whose tokenizer is used; words and marks by default."
        ),
    ] = None,
    max_tokens: Annotated[
        int, typer.Option(min=100, help="Number of tokens to replay; the rest of the text is left out.")
    ] = 50_000,
) -> None:
    """Replay a text through a drafter, beside `suffix` and `ngram`: acceptance by position, and time per step.

    A draft token counts as accepted where it is the next token of the text, as on a server whose greedy answers are
    this text. A step yields the accepted tokens and one more. Neither an engine nor vLLM is needed.
    """
    plugins = [_drafter(name), *(_drafter(other) for other in BESIDE if other != name)]
    chosen = _options(plugins[0], options or [])
    encode = word_tokenizer() if tokenizer is None else _tokenizer(tokenizer)
    try:
        requests = _first(read_requests(text, encode), max_tokens)
    except TextError as error:
        fail(str(error))
    vocab_size = 1 + max(token for request in requests for token in (*request.prompt, *request.answer))
    context = PluginContext(
        model=tokenizer or "",
        max_model_len=max(len(request.prompt) + len(request.answer) for request in requests) + draft_tokens,
        max_num_seqs=1,
        vocab_size=vocab_size,
        num_speculative_tokens=draft_tokens,
        device="cpu",
    )
    rows = []
    for plugin in plugins:
        given = chosen if plugin is plugins[0] else plugin.options()
        with working(f"Replaying with {plugin.name} …"):
            try:
                found = replay(_builder(plugin, given, context), requests, draft_tokens, vocab_size)
            except ContractError as error:
                fail(f"drafter {plugin.name}: {error}; vllm_instant.testing.check_drafter finds more of this kind")
        rows.append([plugin.name, *_columns(found)])
    positions = [str(position) for position in range(1, draft_tokens + 1)]
    print_columns(("accepted at position", *positions, "drafted/step", "accepted/step", "tokens/step", "µs/step"), rows)
    unit = f"tokens of {tokenizer}" if tokenizer else "tokens are words and marks; --tokenizer MODEL takes a model's"
    print(f"{len(requests)} requests, {sum(len(r.answer) for r in requests)} tokens generated ({unit})")


def _drafter(name: str) -> Plugin:
    """An installed drafter that can draft without an engine."""
    found = plugin_manager().find("drafter", name)
    if len(found) != 1:
        state = "is not installed" if not found else f"is installed {len(found)} times"
        fail(f"drafter {name} {state}; installed drafters: {', '.join(plugin_manager().names('drafter'))}")
    plugin = found[0].plugin
    if name != "ngram" and (plugin.build is None or plugin.engine_arguments is not None):
        fail(f"drafter {name} drafts with a model that vLLM runs, which a replay does not have")
    return plugin


def _builder(plugin: Plugin, options: Any, context: PluginContext) -> Callable[[], Drafter]:
    if plugin.build is None:
        return lambda: NgramLookup(options.prompt_lookup_min, options.prompt_lookup_max)
    build = plugin.build
    return lambda: build(options, context)


def _options(plugin: Plugin, pairs: Sequence[str]) -> Any:
    """The options of a plugin with those set that the user gave."""
    values: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            fail(f"--option {pair} should be KEY=VALUE")
        try:
            values[key.strip().replace("-", "_")] = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            values[key.strip().replace("-", "_")] = value
    try:
        return plugin.options.model_validate(values)
    except ValidationError as error:
        found = error.errors()[0]
        where = ".".join(map(str, found["loc"]))
        known = ", ".join(plugin.options.model_fields) or "none"
        fail(f"option {where} of drafter {plugin.name}: {found['msg']}; its options: {known}")


def _tokenizer(name: str) -> Callable[[str], list[int]]:
    require("try-drafter --tokenizer", {"transformers": "Transformers"}, extra="distill")
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        fail(f"--tokenizer {name} cannot be loaded: {str(error).splitlines()[0]}")
    return lambda text: list(tokenizer.encode(text, add_special_tokens=False))


def _first(requests: Sequence[ReplayedRequest], max_tokens: int) -> list[ReplayedRequest]:
    """The first requests, with this many tokens to generate in all."""
    found: list[ReplayedRequest] = []
    for request in requests:
        room = max_tokens - sum(len(earlier.answer) for earlier in found)
        if room < 2:
            break
        found.append(ReplayedRequest(request.prompt, request.answer[:room]))
    return found


def _columns(found: Replay) -> list[str]:
    accepted = [f"{count / found.steps:.2f}" for count in found.accepted_by_position]
    return [
        *accepted,
        f"{found.drafted / found.steps:.2f}",
        f"{found.accepted_per_step:.2f}",
        f"{1 + found.accepted_per_step:.2f}",
        f"{sum(found.step_seconds) / found.steps * 1e6:.0f}",
    ]
