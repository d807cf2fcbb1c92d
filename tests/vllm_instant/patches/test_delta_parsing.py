"""Streamed tool calls and reasoning say the same whether their tokens arrive one by one or many in one delta."""

import json
import random
import re
from types import SimpleNamespace

import pytest
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.parser.abstract_parser import DelegatingParser
from vllm.reasoning import ReasoningParserManager
from vllm.tool_parsers import ToolParserManager

from vllm_instant.patches import delta_parsing

pytestmark = pytest.mark.unit
STEP3 = [
    "Let me see. ",
    "<｜tool_calls_begin｜>",
    "<｜tool_call_begin｜>",
    "function",
    "<｜tool_sep｜>",
    '<steptml:invoke name="get_weather">',
    '<steptml:parameter name="city">',
    "Paris",
    "</steptml:parameter>",
    "</steptml:invoke>",
    "<｜tool_call_end｜>",
    "<｜tool_calls_end｜>",
]
GRANITE = ["Here is", " my thought", " process:", " it is", " sunny.", " Here is", " my response:", " Su", "n", "."]
TOOL = {
    "type": "function",
    "function": {"name": "get_weather", "parameters": {"properties": {"city": {"type": "string"}}}},
}


class Tokenizer:
    """Token ids are places in a list of pieces; one may be part of a character."""

    def __init__(self, pieces):
        self._pieces = [piece if isinstance(piece, bytes) else piece.encode() for piece in pieces]
        self.all_special_ids = []

    def get_vocab(self):
        return {piece.decode(errors="replace"): number for number, piece in enumerate(self._pieces)}

    def decode(self, ids, skip_special_tokens=True):
        shown = [i for i in ids if not (skip_special_tokens and i in self.all_special_ids)]
        return b"".join(self._pieces[i] for i in shown).decode(errors="replace")

    def encode(self, text, add_special_tokens=False):
        return []


def parsed(pieces, sizes, tool=None, reasoning=None, wrapped=True):
    """Content, reasoning and calls of all deltas of these sizes."""

    plain = vars(DelegatingParser)["parse_delta"]

    class Made(DelegatingParser):
        # Other tests of this process may have activated the patch.
        parse_delta = getattr(plain, "__wrapped__", plain)
        tool_parser_cls = tool and ToolParserManager.get_tool_parser(tool)
        reasoning_parser_cls = reasoning and ReasoningParserManager.get_reasoning_parser(reasoning)

    request = ChatCompletionRequest(messages=[], tools=[TOOL] if tool else None)
    parser, tokenizer = Made(Tokenizer(pieces), request.tools), Tokenizer(pieces)
    text, thought, calls, shown, place = "", "", {}, "", 0
    for size in sizes:
        ids = list(range(place, place + size))
        place += size
        whole = tokenizer.decode(range(place)).removesuffix("\ufffd")
        delta, shown = whole[len(shown) :], whole
        arguments = (delta, ids, request, [])
        finished = place == len(pieces)
        if wrapped:
            message = delta_parsing._parse_delta(parser.parse_delta, parser, *arguments, finished=finished)
        else:
            message = parser.parse_delta(*arguments, finished=finished)
        if message is None:
            continue
        text, thought = text + (message.content or ""), thought + (message.reasoning or "")
        for call in message.tool_calls:
            found = calls.setdefault(call.index, {"name": "", "arguments": ""})
            found["name"] += call.function.name or ""
            found["arguments"] += call.function.arguments or ""
    assert place == len(pieces)
    return text, thought, calls


def cuts(count, seed):
    """Sizes of deltas that make up ``count`` tokens."""
    choose, sizes = random.Random(seed), []
    while sum(sizes) < count:
        sizes.append(min(choose.randint(1, 9), count - sum(sizes)))
    return sizes


def test_vllm_alone_loses_the_arguments_of_a_call_that_arrives_in_one_delta():
    """The fault; without it the patch is not needed any more."""
    assert parsed(STEP3, [len(STEP3)], tool="step3", wrapped=False)[2].get(0, {}).get("arguments", "") == ""


@pytest.mark.parametrize("seed", range(12))
def test_a_step3_call_keeps_its_arguments_however_its_tokens_arrive(seed):
    sizes = [len(STEP3)] if seed == 0 else cuts(len(STEP3), seed)
    text, _, calls = parsed(STEP3, sizes, tool="step3")
    assert (text, list(calls)) == ("Let me see. ", [0])
    assert calls[0]["name"] == "get_weather"
    assert json.loads(calls[0]["arguments"]) == {"city": "Paris"}


@pytest.mark.parametrize("seed", range(12))
def test_reasoning_is_divided_as_token_by_token(seed):
    one_by_one = parsed(GRANITE, [1] * len(GRANITE), reasoning="granite", wrapped=False)
    assert one_by_one[:2] == (" Sun.", " it is sunny. ")
    assert parsed(GRANITE, cuts(len(GRANITE), seed), reasoning="granite") == one_by_one


ARGUMENTS = '{"city": "Paris"}'
CALLS = {
    "xlam": f'[{{"name": "get_weather", "arguments": {ARGUMENTS}}}]',
    "hunyuan_a13b": f'<tool_calls>[{{"name": "get_weather", "arguments": {ARGUMENTS}}}]</tool_calls>',
    "apertus": f'<|tools_prefix|>[{{"get_weather": {ARGUMENTS}}}]<|tools_suffix|>',
}
"""Further formats whose parsers say something else where several tokens arrive at once."""


@pytest.mark.parametrize("parser", CALLS)
def test_calls_of_other_formats_are_those_of_token_by_token(parser):
    pieces = re.findall(r"<[^>]*>|\w+|\W", CALLS[parser])
    one_by_one = parsed(pieces, [1] * len(pieces), tool=parser, wrapped=False)
    assert one_by_one[2][0] == {"name": "get_weather", "arguments": ARGUMENTS}
    for seed in range(12):
        assert parsed(pieces, cuts(len(pieces), seed), tool=parser) == one_by_one


def test_characters_of_several_tokens_are_not_torn():
    pieces = [b"a", b"\xe2\x82", b"\xac", b"b"]
    tokenizer = Tokenizer(pieces)
    assert delta_parsing.divided(tokenizer, [0], [1, 2, 3], "€b", True) == ["", "€", "b"]


@pytest.mark.parametrize("skipped", [True, False])
def test_special_tokens_are_shown_or_not_as_in_the_text(skipped):
    tokenizer = Tokenizer(["a", "<end>", "b"])
    tokenizer.all_special_ids = [1]
    text = "ab" if skipped else "a<end>b"
    request = ChatCompletionRequest(messages=[], skip_special_tokens=True)
    parser, seen = SimpleNamespace(model_tokenizer=tokenizer), []

    def parse(piece, ids, *_, **__):
        seen.append((piece, ids))

    delta_parsing._parse_delta(parse, parser, text, [0, 1, 2], request, finished=True)
    assert seen == [("a", [0]), ("" if skipped else "<end>", [1]), ("b", [2])]


def test_a_text_that_the_tokens_do_not_decode_to_is_left_whole():
    """A stop string holds back the end of a text."""
    tokenizer = Tokenizer(["a", "b", "c"])
    assert delta_parsing.divided(tokenizer, [], [0, 1, 2], "ab", True) is None
    assert parsed(["Paris ", "is ", "big"], [3], tool="step3")[0] == "Paris is big"
