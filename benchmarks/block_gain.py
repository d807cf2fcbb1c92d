"""How many more draft tokens ``block`` keeps than ``token``, of the same drafts, by draft length.

.venv/bin/python benchmarks/block_gain.py

In many places of held-out text the demo's draft model samples eight tokens (temperature 1, float32), and the target
judges them. For each draft and each length both rules' expected number of kept tokens is then computed exactly, from
the chances that the samplers themselves use, so that the only noise left is which drafts were sampled. Intervals are
bootstraps over places. Nothing is timed; no engine.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from results import write
from transformers import AutoModelForCausalLM, AutoTokenizer

from vllm_instant.speculation.verification import pad_drafts
from vllm_instant.tools.demo import assets, widen_model
from vllm_instant.tools.demo.corpus import documents
from vllm_instant_plugins.samplers import block
from vllm_instant_plugins.samplers.token import ratios

LENGTHS = range(2, 9)
CONTEXT = 96


def kept_of(target_probs: torch.Tensor, draft_probs: torch.Tensor, drafts: torch.Tensor) -> tuple[Any, Any]:
    """Expected kept tokens of each draft by both rules: ``token``, ``block``; float64 ``[batch]`` each.

    Args:
        target_probs: float32 ``[batch, length, vocabulary]``.
        draft_probs: the same of the draft model.
        drafts: int64 ``[batch, length]``.

    """
    batch, length = drafts.shape
    rows = pad_drafts(drafts.flatten(), [length] * batch)
    target, draft = target_probs.flatten(0, 1).contiguous(), draft_probs.flatten(0, 1).contiguous()
    of_drafts = ratios(rows, target, draft)
    by_token = of_drafts.clamp(max=1).cumprod(1).sum(1)
    chances = block.length_chances(rows, block.weights(of_drafts), target, draft)
    # A length is reached when it or a longer one is acceptable.
    reached = 1 - (1 - chances).flip(1).cumprod(1).flip(1)
    return by_token, reached.sum(1)


def places(tokenizer: Any, kind: str, count: int) -> torch.Tensor:
    """int64 ``[count, CONTEXT]``: evenly spread over the held-out documents of a kind."""
    text = "\n".join(document.text for document in documents() if document.held_out and document.kind == kind)
    stream = torch.tensor(tokenizer(text)["input_ids"])
    starts = torch.linspace(0, len(stream) - CONTEXT - 1, count).long()
    return torch.stack([stream[start : start + CONTEXT] for start in starts])


def drafted(target: Any, draft: Any, tokens: torch.Tensor, length: int, temperature: float) -> tuple[Any, Any, Any]:
    """Both models' probabilities ``[batch, length, vocabulary]`` and the drafts ``[batch, length]``."""
    said = []
    with torch.inference_mode():
        for _ in range(length):
            said.append((draft(input_ids=tokens).logits[:, -1].float() / temperature).softmax(-1))
            tokens = torch.cat([tokens, torch.multinomial(said[-1], 1)], 1)
        judged = (target(input_ids=tokens).logits[:, CONTEXT - 1 : -1].float() / temperature).softmax(-1)
    return judged, torch.stack(said, 1), tokens[:, CONTEXT:]


def main() -> None:
    """Measure, print, write ``benchmarks/results/block_gain.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--places", type=int, default=1500, help="drafts of each class of text")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results/block_gain.json")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    pair = assets.prepare(size=widen_model.SMALL, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(pair.target)
    target, draft = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval() for path in (pair.target, pair.draft)
    )
    cells = []
    for kind in ("structured", "code"):
        both: dict[int, list[tuple[Any, Any]]] = {length: [] for length in LENGTHS}
        for group in places(tokenizer, kind, arguments.places).split(25):
            judged, said, drafts = drafted(target, draft, group, max(LENGTHS), arguments.temperature)
            for length in LENGTHS:
                both[length].append(kept_of(judged[:, :length], said[:, :length], drafts[:, :length]))
        for length, parts in both.items():
            token, blocks = (torch.cat(part).numpy() for part in zip(*parts, strict=True))
            picks = np.random.default_rng(0).integers(0, len(token), (4000, len(token)))
            gains = blocks[picks].mean(1) / token[picks].mean(1)
            low, high = np.quantile(gains, [0.025, 0.975])
            cell = {
                "text": kind,
                "draft_length": length,
                "temperature": arguments.temperature,
                "drafts": len(token),
                "kept_by_token": token.mean(),
                "kept_by_block": blocks.mean(),
                "gain": {"mean": blocks.mean() / token.mean(), "low": low, "high": high},
                "tokens_per_step_gain": (1 + blocks.mean()) / (1 + token.mean()),
            }
            cells.append(cell)
            print(
                f"{kind:10} length {length}: {cell['kept_by_token']:.3f} -> {cell['kept_by_block']:.3f} kept, "
                f"gain {cell['gain']['mean']:.3f} [{low:.3f}, {high:.3f}]",
                flush=True,
            )
    write(arguments.output, cells)


if __name__ == "__main__":
    main()
