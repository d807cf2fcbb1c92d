"""The model reads the prompt and answers a question about it with one token.

The question stands behind the prompt, so that the prompt's keys and values are computed once: the request that follows
finds them in the prefix cache.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from vllm_instant.interfaces.escalation import Decision, Depth, Escalation, EscalationRequest, Question

_SHARED = ("model", "tools", "chat_template", "chat_template_kwargs", "documents", "cache_salt", "mm_processor_kwargs")
"""Fields of a request on which the beginning of its rendered prompt depends, or who may share it."""
_NUM_ALTERNATIVES = 20
"""vLLM's default limit of log probabilities per token."""


class Label(Escalation):
    """The escalation ``label``.

    Args:
        question: What is asked about the prompt.
        yes: The answer for which a request goes deep.
        no: The other one.
        threshold: Probability of ``yes``, among both, from which it does.
        max_wait: Seconds to wait for the answer.

    """

    def __init__(self, question: str, yes: str, no: str, threshold: float, max_wait: float) -> None:
        self._question = question
        self._yes = yes.lower()
        self._no = no.lower()
        self._threshold = threshold
        self._max_wait = max_wait

    def decide(self, request: EscalationRequest, answer: Mapping[str, Any] | None) -> Decision | Question:
        if answer is None:
            body = self._body(request)
            return Decision(Depth.FAST, "label: no text") if body is None else Question(body, self._max_wait)
        probability = self._probability(answer)
        if probability is None:
            return Decision(Depth.FAST, "label: no answer")
        depth = Depth.DEEP if probability >= self._threshold else Depth.FAST
        return Decision(depth, "label", probability)

    def _body(self, request: EscalationRequest) -> dict[str, Any] | None:
        body = {key: request.body[key] for key in _SHARED if key in request.body}
        body |= {"max_tokens": 1, "temperature": 0}
        if "messages" not in request.body:
            prompt = request.body.get("prompt")
            if not isinstance(prompt, str):
                return None
            return body | {"prompt": f"{prompt}\n\n{self._question}\nAnswer:", "logprobs": _NUM_ALTERNATIVES}
        messages = request.body["messages"]
        if not isinstance(messages, list) or not messages or not isinstance(messages[-1], Mapping):
            return None
        body["messages"] = self._with_question(messages)
        # Thinking would begin with another token than the answer.
        body["chat_template_kwargs"] = {**(body.get("chat_template_kwargs") or {}), "enable_thinking": False}
        if "tools" in body:
            body["tool_choice"] = "none"
        return body | {"logprobs": True, "top_logprobs": _NUM_ALTERNATIVES}

    def _with_question(self, messages: list[Any]) -> list[Any]:
        """The question at the end of the newest user message: many templates refuse two of them in a row."""
        last = messages[-1]
        content = last.get("content")
        if last.get("role") == "user" and isinstance(content, str):
            return [*messages[:-1], {**last, "content": f"{content}\n\n{self._question}"}]
        part = {"type": "text", "text": self._question}
        if last.get("role") == "user" and isinstance(content, list):
            return [*messages[:-1], {**last, "content": [*content, part]}]
        return [*messages, {"role": "user", "content": self._question}]

    def _probability(self, answer: Mapping[str, Any]) -> float | None:
        """The probability of ``yes`` among both answers; None where the model gives neither."""
        yes = no = 0.0
        for token, logprob in _alternatives(answer):
            word = token.strip().lower()
            if not word:
                continue
            # The model may spell an answer with several tokens.
            if self._yes.startswith(word):
                yes += math.exp(min(0.0, logprob))
            elif self._no.startswith(word):
                no += math.exp(min(0.0, logprob))
        return yes / (yes + no) if yes + no > 0 else None


def _alternatives(answer: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """The likeliest first tokens of an answer with their log probabilities."""
    try:
        logprobs = answer["choices"][0]["logprobs"]
        if "content" in logprobs:
            for entry in logprobs["content"][0]["top_logprobs"]:
                yield str(entry["token"]), float(entry["logprob"])
        else:
            for token, logprob in logprobs["top_logprobs"][0].items():
                yield str(token), float(logprob)
    except (KeyError, IndexError, TypeError, ValueError):
        return
