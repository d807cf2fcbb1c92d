"""The requests of the table "same answers": every request option of vLLM alone, and each pair of options together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import covertable

REPEATED = "alpha = 1\nbeta = 2\ngamma = 3\ndelta = 4\n" * 6
CODE = "def add(a, b):\n    return a + b\n\n\ndef sub(a, b):\n    return a - b\n\n\n" * 3
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}
GRAMMAR = 'root ::= "a" b "c"\nb ::= "x" | "y" b'
TAGS = {
    "type": "structural_tag",
    "format": {
        "type": "triggered_tags",
        "tags": [{"begin": "<f>", "content": {"type": "json_schema", "json_schema": SCHEMA}, "end": "</f>"}],
        "triggers": ["<f>"],
    },
}
TOOL = {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": SCHEMA}}
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
TOKENS = 24

Options = Mapping[str, Any]
PLAIN: Options = {}
FACTORS: dict[str, dict[str, Options]] = {
    "sampling": {
        "greedy": {"temperature": 0},
        "seeded": {"temperature": 1.0, "seed": 11},
        "top_k 1": {"temperature": 1.0, "top_k": 1},
        "top_p and top_k": {"temperature": 0.8, "top_p": 0.7, "top_k": 20, "seed": 12},
        "min_p": {"temperature": 1.2, "min_p": 0.1, "seed": 13},
        "likeliest by min_p": {"temperature": 1.0, "min_p": 1.0},
    },
    "penalties": {
        "none": PLAIN,
        "presence": {"presence_penalty": 1.2},
        "frequency": {"frequency_penalty": 0.7},
        "repetition": {"repetition_penalty": 1.3},
    },
    "allowed": {
        "all": PLAIN,
        "logit_bias": {"logit_bias": {"17": 4.0, "300": -100.0}},
        "allowed_token_ids": {"allowed_token_ids": list(range(900))},
        "bad_words": {"bad_words": ["alpha", "return"]},
    },
    "form": {
        "free": PLAIN,
        "regex": {"structured_outputs": {"regex": "[a-z_]{3,9}\\([a-z]*\\)"}},
        "json": {"structured_outputs": {"json": SCHEMA}},
        "choice": {"structured_outputs": {"choice": ["alpha = 1", "beta = 2", "alpha = 7"]}},
        "grammar": {"structured_outputs": {"grammar": GRAMMAR}},
        "json_object": {"response_format": {"type": "json_object"}},
        "structural_tag": {"response_format": TAGS},
    },
    "end": {
        "length": PLAIN,
        "one token": {"max_tokens": 1},
        "stop": {"stop": ["\n\n", "gamma"]},
        "stop included": {"stop": ["="], "include_stop_str_in_output": True},
        "stop token": {"stop_token_ids": list(range(100, 200))},
        "min_tokens": {"min_tokens": 3},
        "ignore_eos": {"ignore_eos": True},
        "repetition_detection": {
            "repetition_detection": {"max_pattern_size": 4, "min_pattern_size": 1, "min_count": 3}
        },
    },
    "shown": {
        "text": PLAIN,
        "logprobs": {"logprobs": 3},
        "logprobs 0": {"logprobs": 0},
        "prompt_logprobs": {"prompt_logprobs": 2},
        "echo": {"echo": True},
        "token ids": {"return_token_ids": True},
        "logprob_token_ids": {"logprobs": 1, "logprob_token_ids": [5, 17, 300]},
        "tokens as ids": {"logprobs": 2, "return_tokens_as_token_ids": True},
        "special tokens": {"skip_special_tokens": False, "spaces_between_special_tokens": False},
    },
    "choices": {"one": PLAIN, "two": {"n": 2}},
    "prompt": {
        "repeated text": {"prompt": REPEATED},
        "code": {"prompt": CODE},
        "prompt of token ids": {"prompt": [17, 300, 301, 302] * 8},
        "prompt of one token": {"prompt": [42]},
        "several": {"prompt": [REPEATED, "def first_of(numbers):"]},
        "truncated": {"prompt": CODE * 3, "truncate_prompt_tokens": 40},
        "no special tokens": {"prompt": REPEATED, "add_special_tokens": False},
    },
    "transport": {
        "whole": PLAIN,
        "streamed": {"stream": True},
        "streamed with usage": {
            "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        },
        "streamed in fours": {"stream": True, "stream_interval": 4},
    },
    "context": {
        "none": PLAIN,
        "cache_salt": {"cache_salt": "a tenant"},
        "priority": {"priority": 3},
        "user": {"user": "a user"},
    },
}
"""Options of completions by what they are about; the first of each is the default.

Any two leave a token that is allowed: where none is, the sampled one is chance.
"""

_SAID = [{"role": "user", "content": CODE}]
_BEGUN = [*_SAID, {"role": "assistant", "content": "def mul(a, b):\n"}]
_JSON = {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}
CHATS: dict[str, Options] = {
    "chat": PLAIN,
    "chat, streamed": {"stream": True},
    "chat, logprobs": {"logprobs": True, "top_logprobs": 3},
    "chat, json_schema": {"response_format": _JSON},
    "chat, tools": {"tools": [TOOL]},
    "chat, tool required": {"tools": [TOOL], "tool_choice": "required"},
    "chat, tool required, streamed": {"tools": [TOOL], "tool_choice": "required", "stream": True},
    "chat, tool named": {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "add"}}},
    "chat, continued": {"messages": _BEGUN, "continue_final_message": True, "add_generation_prompt": False},
    "chat, echo": {"echo": True},
    "chat, template arguments": {"chat_template_kwargs": {"enable_thinking": False}},
    "chat, two": {"n": 2, "temperature": 1.0, "seed": 5},
    "chat, prompt_logprobs": {"prompt_logprobs": 1},
    "chat, thinking budget": {"thinking_token_budget": 4},
}
OTHERS: dict[str, tuple[str, Options]] = {
    "responses": ("/v1/responses", {"input": CODE, "max_output_tokens": TOKENS, "temperature": 0}),
    "messages": ("/v1/messages", {"messages": _SAID, "max_tokens": TOKENS, "temperature": 0}),
    "generate": (
        "/inference/v1/generate",
        {"token_ids": [17, 300, 301, 302] * 8, "sampling_params": {"max_tokens": TOKENS, "temperature": 0}},
    ),
    "adapter": (COMPLETIONS, {"model": "adapter", "prompt": CODE, "max_tokens": TOKENS, "temperature": 0}),
    "adapter, streamed": (CHAT, {"model": "adapter", "messages": _SAID, "max_tokens": TOKENS, "stream": True}),
    "tokenize": ("/tokenize", {"prompt": CODE}),
    "mistake": (COMPLETIONS, {"prompt": CODE, "top_p": 7}),
    "too long": (COMPLETIONS, {"prompt": CODE * 60, "max_tokens": 4}),
}


@dataclass(frozen=True)
class Feature:
    """One request of the table."""

    name: str
    path: str
    body: Options

    @property
    def is_alone(self) -> bool:
        """Whether it is sent beside no other: vLLM gives all requests of a batch the tokens that one asks for."""
        return "logprob_token_ids" in self.body

    @property
    def has_form(self) -> bool:
        """Whether a grammar says which tokens may come."""
        return "structured_outputs" in self.body or "response_format" in self.body

    @property
    def scores_prompt(self) -> bool:
        """Whether it asks for log-probabilities of the prompt."""
        return "prompt_logprobs" in self.body or bool(self.body.get("echo") and "logprobs" in self.body)

    def request(self, model: str, drafts: int | None = None) -> dict[str, Any]:
        """The body for a model, with a pinned number of draft tokens if wished, where the route takes them."""
        body = {"model": model, **self.body}
        if drafts is not None and self.path in (COMPLETIONS, CHAT):
            body["vllm_xargs"] = {"instant_speculation": drafts}
        return body


def _completion(chosen: Mapping[str, str]) -> Feature:
    options: dict[str, Any] = {"max_tokens": TOKENS}
    for factor, level in chosen.items():
        options |= FACTORS[factor][level]
    default = {factor: next(iter(levels)) for factor, levels in FACTORS.items()}
    named = [level for factor, level in chosen.items() if level != default[factor]]
    return Feature(", ".join(named) or "greedy", COMPLETIONS, options)


def single_features() -> list[Feature]:
    """Each option alone."""
    default = {factor: next(iter(levels)) for factor, levels in FACTORS.items()}
    completions = [_completion(default)]
    for factor, levels in FACTORS.items():
        completions += [_completion({**default, factor: level}) for level in list(levels)[1:]]
    chats = [
        Feature(name, CHAT, {"messages": _SAID, "max_tokens": TOKENS, "temperature": 0, **options})
        for name, options in CHATS.items()
    ]
    return [*completions, *chats, *(Feature(name, *found) for name, found in OTHERS.items())]


def pairs_of_features() -> list[Feature]:
    """Completions in which any two options of different factors occur together at least once."""
    rows = covertable.make({factor: list(levels) for factor, levels in FACTORS.items()})
    return [_completion(row) for row in rows]
