"""Quality of a lossy deployment compared with vLLM, from the servers' own log-probabilities.

There are two reports, because quality can be lost in two places:

- **the model's distribution** (attention kernels, KV-cache formats, expert routing): both servers prefill the same
  held-out text, and for every token its log-probability and the top log-probabilities are compared: perplexity of both,
  and the Kullback-Leibler divergence of the deployment from the baseline. Tokens beyond the top ones count as one
  outcome, which makes it a lower bound;
- **the answers** (rejection samplers): both servers answer the same prompts, and the baseline computes the
  log-probability of both servers' answers. A sampler that changes the distribution changes it in either direction.

Intervals are bootstrapped over texts or prompts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from vllm_instant.tools.measure.sampling import IN_FLIGHT, RefusedError, ServerClient, complete
from vllm_instant.tools.measure.statistics import Estimate, estimate

TOP_LOGPROBS = 20
"""Number of top log-probabilities per position: vLLM's default limit (``--max-logprobs``)."""


@dataclass(frozen=True)
class QualityReport:
    """A deployment compared with the baseline."""

    texts: int
    tokens: int
    stock_perplexity: float
    our_perplexity: float
    perplexity_ratio: Estimate
    """Perplexity of the deployment divided by the baseline's; 1 is no difference."""
    divergence: Estimate
    """Kullback-Leibler divergence of the deployment from the baseline, nats per token; a lower bound."""
    answers: int
    answer_gap: Estimate
    """Mean log-probability under the baseline of the deployment's answers, minus that of its own; nats per token."""

    def plain(self) -> dict[str, Any]:
        """The report as JSON types."""
        return asdict(self)


def quality_report(
    ours: ServerClient,
    baseline: ServerClient,
    texts: Sequence[str],
    prompts: Sequence[str],
    tokens: int = 48,
    temperature: float = 1.0,
    in_flight: int = IN_FLIGHT,
) -> QualityReport:
    """Measure both reports.

    Args:
        ours: the deployment's server.
        baseline: vLLM alone with the same model.
        texts: held-out texts for the first report.
        prompts: for sampled answers of ``tokens`` tokens each, for the second report.
        tokens: length of the answers.
        temperature: of the answers.
        in_flight: number of concurrent answers.

    """
    losses = compare_readings(read_texts(ours, texts), read_texts(baseline, texts))
    judged = [likelihood(arm, baseline, prompts, tokens, temperature, in_flight) for arm in (ours, baseline)]
    answer_gaps = judged[0] - judged[1]
    total = losses.sum(0)
    return QualityReport(
        texts=len(texts),
        tokens=int(total[3]),
        stock_perplexity=math.exp(total[0] / total[3]),
        our_perplexity=math.exp(total[1] / total[3]),
        perplexity_ratio=estimate(losses, perplexity_ratio),
        divergence=estimate(losses, divergence),
        answers=len(answer_gaps),
        answer_gap=estimate(answer_gaps[:, None], lambda s: s[:, 0] / len(answer_gaps)),
    )


def compare_readings(ours: TextReadings, baseline: TextReadings) -> np.ndarray:
    """By text: loss of the baseline, loss of ours, divergence (sums over tokens, in nats), number of tokens."""
    return np.array(
        [
            (sum(-p.chosen for p in a), sum(-p.chosen for p in b), sum(map(_divergence, a, b)), len(a))
            for a, b in zip(baseline, ours, strict=True)
        ]
    )


def perplexity_ratio(sums: np.ndarray) -> np.ndarray:
    """Ours divided by the baseline's, from sums of the columns of ``compare_readings``."""
    return np.asarray(np.exp((sums[:, 1] - sums[:, 0]) / sums[:, 3]))


def divergence(sums: np.ndarray) -> np.ndarray:
    """Nats per token, from sums of the columns of ``compare_readings``."""
    return np.asarray(sums[:, 2] / sums[:, 3])


@dataclass(frozen=True)
class TokenReading:
    """A server's log-probabilities at one token of a text."""

    chosen: float
    """Log-probability of the text's token."""
    top: dict[int, float]
    """Top log-probabilities, by token id."""


TextReadings = list[list[TokenReading]]
"""By text, by token."""


def read_texts(arm: ServerClient, texts: Sequence[str]) -> TextReadings:
    """Prefill texts (at most 512 tokens of each) and read their log-probabilities."""
    bodies = [
        arm.body(text, temperature=0, max_tokens=1, prompt_logprobs=TOP_LOGPROBS, truncate_prompt_tokens=512)
        for text in texts
    ]
    reading = []
    for text, choices in zip(texts, complete(arm, bodies), strict=True):
        positions, ids = choices[0].get("prompt_logprobs"), choices[0].get("prompt_token_ids")
        if not positions or not ids:
            raise RefusedError(f"{arm.url} gave no log-probabilities for a text of {len(text)} characters")
        reading.append(
            [
                TokenReading(
                    float(entry[str(token)]["logprob"]),
                    {int(key): float(value["logprob"]) for key, value in entry.items()},
                )
                for token, entry in zip(ids[1:], positions[1:], strict=True)
            ]
        )
    return reading


def _divergence(baseline: TokenReading, ours: TokenReading) -> float:
    """``sum p ln(p / q)`` over the tokens that both report, with all others as one outcome."""
    shared = baseline.top.keys() & ours.top.keys()
    p = [math.exp(baseline.top[token]) for token in shared]
    q = [math.exp(ours.top[token]) for token in shared]
    rest_p, rest_q = max(1e-9, 1 - sum(p)), max(1e-9, 1 - sum(q))
    return sum(a * math.log(a / b) for a, b in zip([*p, rest_p], [*q, rest_q], strict=True) if a > 0)


def likelihood(
    arm: ServerClient,
    baseline: ServerClient,
    prompts: Sequence[str],
    tokens: int,
    temperature: float,
    in_flight: int = IN_FLIGHT,
) -> np.ndarray:
    """By prompt: the mean log-probability under the baseline of the tokens of the arm's sampled answer."""
    bodies = [arm.body(prompt, temperature=temperature, max_tokens=tokens) for prompt in prompts]
    whole = [
        [*choices[0]["prompt_token_ids"], *choices[0]["token_ids"]]
        for choices in complete(arm, bodies, in_flight=in_flight)
    ]
    asked = [baseline.body("", temperature=0, max_tokens=1, prompt_logprobs=0) | {"prompt": ids} for ids in whole]
    means = []
    for ids, choices in zip(whole, complete(baseline, asked), strict=True):
        entries = choices[0]["prompt_logprobs"][-tokens:]
        means.append(np.mean([entry[str(t)]["logprob"] for t, entry in zip(ids[-tokens:], entries, strict=True)]))
    return np.array(means)
