"""What a lossy deployment costs in quality, measured against stock vLLM through the servers' own log-probabilities.

Two reports, because quality is lost in two places:

- **the model's distribution** (attention kernels, KV-cache formats, expert routing): both servers read the same
  held-out text, and for every token its log-probability and the likeliest tokens are compared: perplexity of both, and
  the Kullback-Leibler divergence of ours from stock's, with tokens beyond the likeliest counted as one outcome, which
  makes it a lower bound;
- **the answers** (rejection samplers): both servers answer the same prompts, and the stock server says how likely it
  finds either's answers. A sampler that bends the distribution changes that likelihood, in either direction.

Intervals are bootstraps over texts or prompts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from vllm_instant.tools.measure.sampling import RefusedError, ServerClient, complete
from vllm_instant.tools.measure.statistics import Estimate, estimate

LIKELIEST = 20
"""Tokens whose log-probability is asked for at each position; what vLLM allows unless told otherwise."""


@dataclass(frozen=True)
class QualityReport:
    """Ours against stock."""

    texts: int
    tokens: int
    stock_perplexity: float
    our_perplexity: float
    perplexity_ratio: Estimate
    """Ours by stock's; 1 is no difference."""
    divergence: Estimate
    """Kullback-Leibler divergence of ours from stock's, nats a token; a lower bound."""
    answers: int
    answer_gap: Estimate
    """Mean log-probability that stock gives to our answers' tokens, less what it gives to its own; nats a token."""

    def plain(self) -> dict[str, Any]:
        """As JSON types."""
        return asdict(self)


def quality_report(
    ours: ServerClient,
    stock: ServerClient,
    texts: Sequence[str],
    prompts: Sequence[str],
    tokens: int = 48,
    temperature: float = 1.0,
) -> QualityReport:
    """Measure both reports.

    Args:
        ours: the deployment's server.
        stock: stock vLLM with the same model.
        texts: held-out texts that the servers read.
        prompts: what they answer, sampled, ``tokens`` tokens each.
        tokens: length of the answers.
        temperature: of the answers.

    """
    losses = compare_readings(read_texts(ours, texts), read_texts(stock, texts))
    judged = [likelihood(arm, stock, prompts, tokens, temperature) for arm in (ours, stock)]
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


def compare_readings(ours: TextReadings, stock: TextReadings) -> np.ndarray:
    """By text: stock's loss, ours, the divergence of ours from stock's (sums over tokens, nats), and tokens."""
    return np.array(
        [
            (sum(-p.chosen for p in a), sum(-p.chosen for p in b), sum(map(_divergence, a, b)), len(a))
            for a, b in zip(stock, ours, strict=True)
        ]
    )


def perplexity_ratio(sums: np.ndarray) -> np.ndarray:
    """Ours by stock's, of sums of the columns of ``compare_readings``."""
    return np.asarray(np.exp((sums[:, 1] - sums[:, 0]) / sums[:, 3]))


def divergence(sums: np.ndarray) -> np.ndarray:
    """Nats a token, of sums of the columns of ``compare_readings``."""
    return np.asarray(sums[:, 2] / sums[:, 3])


@dataclass(frozen=True)
class TokenReading:
    """What a server thinks of one token of a text."""

    chosen: float
    """Log-probability of the text's token."""
    likeliest: dict[int, float]
    """Log-probabilities of the likeliest tokens, by id."""


TextReadings = list[list[TokenReading]]
"""By text, by token."""


def read_texts(arm: ServerClient, texts: Sequence[str]) -> TextReadings:
    """Let a server read texts (at most 512 tokens of each)."""
    bodies = [
        arm.body(text, temperature=0, max_tokens=1, prompt_logprobs=LIKELIEST, truncate_prompt_tokens=512)
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


def _divergence(stock: TokenReading, ours: TokenReading) -> float:
    """``sum p ln(p / q)`` over the tokens that both report, and over all others as one outcome."""
    shared = stock.likeliest.keys() & ours.likeliest.keys()
    p = [math.exp(stock.likeliest[token]) for token in shared]
    q = [math.exp(ours.likeliest[token]) for token in shared]
    rest_p, rest_q = max(1e-9, 1 - sum(p)), max(1e-9, 1 - sum(q))
    return sum(a * math.log(a / b) for a, b in zip([*p, rest_p], [*q, rest_q], strict=True) if a > 0)


def likelihood(
    arm: ServerClient, stock: ServerClient, prompts: Sequence[str], tokens: int, temperature: float
) -> np.ndarray:
    """By prompt: the mean log-probability that stock gives to the tokens of the arm's sampled answer."""
    bodies = [arm.body(prompt, temperature=temperature, max_tokens=tokens) for prompt in prompts]
    whole = [[*choices[0]["prompt_token_ids"], *choices[0]["token_ids"]] for choices in complete(arm, bodies)]
    asked = [stock.body("", temperature=0, max_tokens=1, prompt_logprobs=0) | {"prompt": ids} for ids in whole]
    means = []
    for ids, choices in zip(whole, complete(stock, asked), strict=True):
        entries = choices[0]["prompt_logprobs"][-tokens:]
        means.append(np.mean([entry[str(t)]["logprob"] for t, entry in zip(ids[-tokens:], entries, strict=True)]))
    return np.array(means)
