"""Streamed tool calls and reasoning are parsed token by token, also where drafts bring several tokens in one step.

Without speculation a delta is nearly always one token, and some of vLLM's parsers rely on that: ``step3`` drops the
arguments of a call whose name and end arrive in the same delta. The text of a delta is divided among its tokens, each
is parsed as vLLM would have parsed it, and what the parser returns is merged into one message.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vllm_instant.patches.compat import HasSignature, References, VllmPatch
from vllm_instant.patches.names import OUTPUT_PARSER

_CONTEXT = "instant_last_token_ids"
"""On a parser: the newest tokens, because some tokenizers decode a token by what precedes it."""
CONTEXT_TOKENS = 8
INCOMPLETE = "\ufffd"
"""How tokenizers show bytes that are no character yet."""


def divided(
    tokenizer: Any, context: Sequence[int], token_ids: Sequence[int], text: str, skip_special_tokens: bool
) -> list[str] | None:
    """The text that each token adds to ``text``, all of which the tokens decode to.

    Returns None where they decode to another text, for example because a stop string holds back its end.
    """
    before = [*context]
    shown = tokenizer.decode(before, skip_special_tokens=skip_special_tokens)
    pieces = []
    for token_id in token_ids:
        before.append(token_id)
        longer = tokenizer.decode(before, skip_special_tokens=skip_special_tokens)
        if longer.endswith(INCOMPLETE) or not longer.startswith(shown):
            pieces.append("")
            continue
        pieces.append(longer[len(shown) :])
        shown = longer
    return pieces if "".join(pieces) == text else None


def merged(messages: Sequence[Any]) -> Any:
    """One ``DeltaMessage`` that says what several say in turn; None if none says anything."""
    said = [message for message in messages if message is not None]
    if len(said) < 2:
        return said[0] if said else None
    fields: dict[str, Any] = {}
    for name in ("role", "content", "reasoning"):
        parts = [getattr(message, name) for message in said if getattr(message, name) is not None]
        if parts:
            fields[name] = parts[0] if name == "role" else "".join(parts)
    calls: list[Any] = []
    for call in (call for message in said for call in message.tool_calls):
        same = next((one for one in calls if one.index == call.index and call.id in (None, one.id)), None)
        if same is None:
            calls.append(call.model_copy(deep=True))
        elif same.function is None or call.function is None:
            same.function = same.function or call.function
        else:
            same.function.name = same.function.name or call.function.name
            if call.function.arguments is not None:
                same.function.arguments = (same.function.arguments or "") + call.function.arguments
    return type(said[0])(**fields, **({"tool_calls": calls} if calls else {}))


def _parse_delta(
    parse: Any,
    parser: Any,
    delta_text: str,
    delta_token_ids: list[int],
    request: Any,
    prompt_token_ids: list[int] | None = None,
    *,
    finished: bool,
) -> Any:
    context: list[int] = getattr(parser, _CONTEXT, [])
    setattr(parser, _CONTEXT, [*context, *delta_token_ids][-CONTEXT_TOKENS:])
    if len(delta_token_ids) > 1:
        # A parser may have changed what the detokenizer was asked for.
        asked = bool(getattr(request, "skip_special_tokens", True))
        tried = (
            divided(parser.model_tokenizer, context, delta_token_ids, delta_text, skip) for skip in (asked, not asked)
        )
        pieces = next((found for found in tried if found is not None), None)
        if pieces is not None:
            last = len(pieces) - 1
            return merged(
                [
                    parse(piece, [token_id], request, prompt_token_ids, finished=finished and number == last)
                    for number, (piece, token_id) in enumerate(zip(pieces, delta_token_ids, strict=True))
                ]
            )
    return parse(delta_text, delta_token_ids, request, prompt_token_ids, finished=finished)


_PARSER = "parser/abstract_parser.py"

PATCH = VllmPatch(
    name="delta_parsing",
    purpose="streamed tool calls are parsed token by token",
    requirements=(
        HasSignature(
            _PARSER,
            "DelegatingParser.parse_delta",
            ("self", "delta_text", "delta_token_ids", "request", "prompt_token_ids"),
        ),
        References(_PARSER, "Parser.__init__", ("model_tokenizer",)),
    ),
    slots=("speculation",),
    optional=True,
    wraps={f"{OUTPUT_PARSER}:DelegatingParser.parse_delta": _parse_delta},
)
