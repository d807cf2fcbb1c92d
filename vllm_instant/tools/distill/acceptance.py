"""How many of a draft model's tokens its target accepts, by the rule that servers use.

From many places in held-out text the draft model proposes tokens, one after the other; the target then judges all of
them in one pass. At temperature 0 a token is accepted when the target would pick it; above, with probability
min(1, p/q), where p and q are the target's and the draft's probability of it (Leviathan et al. 2023).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Acceptance:
    """Acceptance of one class of text at one temperature."""

    text: str
    temperature: float
    places: int
    """Number of places at which the draft model proposed tokens."""
    by_position: list[float]
    """Share of accepted tokens by draft position, of those whose predecessors were accepted."""
    mean_length: float
    """Accepted draft tokens per step, of the full number proposed."""

    def plain(self) -> dict[str, Any]:
        """As JSON types."""
        return asdict(self)


def measure(
    target: Any,
    draft: Any,
    stream: torch.Tensor,
    name: str,
    temperature: float,
    positions: int = 8,
    places: int = 128,
    context: int = 128,
    batch: int = 32,
    seed: int = 0,
) -> Acceptance:
    """Propose and verify in ``places`` places of a token stream.

    Args:
        target: Hugging Face model.
        draft: Hugging Face model with the same vocabulary.
        stream: int64 ``[tokens]`` of held-out text.
        name: name of the class of text.
        temperature: 0 is greedy.
        positions: draft tokens that are proposed.
        places: how many places; fewer when the stream is short.
        context: tokens before each place.
        batch: places that are worked on side by side.
        seed: of sampling and acceptance.

    """
    generator = torch.Generator().manual_seed(seed)
    context = min(context, len(stream) // 2)
    places = max(1, min(places, len(stream) - context))
    starts = torch.linspace(0, len(stream) - context - 1, places).long()
    kept: list[torch.Tensor] = []
    with torch.inference_mode():
        for group in starts.split(batch):
            tokens = torch.stack([stream[s : s + context] for s in group]).to(target.device)
            kept.append(_accepted(target, draft, tokens, temperature, positions, generator))
    accepted = torch.cat(kept)
    reached = torch.cat([torch.ones(len(accepted), 1), accepted[:, :-1]], 1)
    by_position = (accepted.sum(0) / reached.sum(0).clamp(min=1)).tolist()
    return Acceptance(name, temperature, len(accepted), by_position, float(accepted.sum(1).mean()))


def _accepted(
    target: Any, draft: Any, tokens: torch.Tensor, temperature: float, positions: int, generator: torch.Generator
) -> torch.Tensor:
    """Float ``[batch, positions]``: 1 where the token and all before it are accepted."""
    context = tokens.shape[1]
    proposals = []
    # Only the last logits: with a large vocabulary those of a whole context cost more than the model.
    unread, cache = tokens, None
    for _ in range(positions):
        output = draft(input_ids=unread, past_key_values=cache, use_cache=True, logits_to_keep=1)
        q = _distribution(output.logits[:, -1], temperature)
        token = q.argmax(-1, keepdim=True) if temperature == 0 else torch.multinomial(q.cpu(), 1, generator=generator)
        token = token.to(tokens.device)
        proposals.append(q.gather(-1, token))
        tokens = torch.cat([tokens, token], 1)
        cache = getattr(output, "past_key_values", None)
        unread = tokens if cache is None else token
    logits = target(input_ids=tokens, use_cache=False, logits_to_keep=positions + 1).logits
    p = _distribution(logits[:, -positions - 1 : -1], temperature)
    proposed = tokens[:, context:]
    ratio = p.gather(-1, proposed[..., None])[..., 0] / torch.cat(proposals, 1)
    uniform = torch.rand(ratio.shape, generator=generator).to(ratio.device)
    return (uniform < ratio).float().cumprod(1).cpu()


def _distribution(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """Probabilities; at temperature 0 all on the likeliest token."""
    if temperature == 0:
        best = logits.argmax(-1, keepdim=True)
        return torch.zeros_like(logits, dtype=torch.float32).scatter_(-1, best, 1.0)
    return (logits.float() / temperature).softmax(-1)
