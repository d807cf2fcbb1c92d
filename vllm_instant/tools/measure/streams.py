"""One streamed completion, measured by token.

Under speculation one server-sent event carries several tokens: counting events would make a server look several times
slower or faster than it is. vLLM reports the number of tokens so far with every event when asked, and that is counted.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass
class StreamedAnswer:
    """What came back, and when; times in seconds since the request was sent."""

    text: str = ""
    arrivals: list[tuple[float, int]] = field(default_factory=list)
    """``(time, tokens so far)`` for every event that brought tokens."""

    @property
    def tokens(self) -> int:
        """Tokens of the answer."""
        return self.arrivals[-1][1] if self.arrivals else 0

    @property
    def ttft(self) -> float:
        """Time to the first event with tokens; NaN if none came."""
        return self.arrivals[0][0] if self.arrivals else float("nan")

    @property
    def tokens_per_second(self) -> float:
        """Decoding speed after the first event; NaN when everything came at once."""
        if len(self.arrivals) < 2:
            return float("nan")
        (first_time, first_tokens), (last_time, last_tokens) = self.arrivals[0], self.arrivals[-1]
        return (last_tokens - first_tokens) / (last_time - first_time)


def stream_completion(
    client: Any, model: str, prompt: str, on_text: Callable[[str], None] | None = None, **sampling: Any
) -> StreamedAnswer:
    """Send one completion through an OpenAI client and follow the stream.

    Args:
        client: an ``openai.OpenAI`` client.
        model: served model name.
        prompt: the prompt.
        on_text: called with each piece of text as it arrives.
        **sampling: further parameters of the request; unknown ones go into ``extra_body``.

    """
    answer = StreamedAnswer()
    known = {"max_tokens", "temperature", "top_p", "seed", "stop", "logprobs", "n"}
    extra = {key: value for key, value in sampling.items() if key not in known}
    started = time.perf_counter()
    events = client.completions.create(
        model=model,
        prompt=prompt,
        stream=True,
        stream_options={"include_usage": True, "continuous_usage_stats": True},
        extra_body=extra or None,
        **{key: value for key, value in sampling.items() if key in known},
    )
    for event in events:
        now = time.perf_counter() - started
        tokens = event.usage.completion_tokens if event.usage is not None else answer.tokens
        if tokens > answer.tokens:
            answer.arrivals.append((now, tokens))
        if event.choices and event.choices[0].text:
            answer.text += event.choices[0].text
            if on_text is not None:
                on_text(event.choices[0].text)
    return answer
