"""Block verification as the paper writes it, request by request (Sun et al. 2024, arXiv 2403.10444, algorithm 2)."""

from __future__ import annotations

import torch


def verify_blocks_reference(
    draft_token_ids: torch.Tensor,
    ends: torch.Tensor,
    draft_probs: torch.Tensor | None,
    target_probs: torch.Tensor,
    uniforms: torch.Tensor,
    noise: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What ``vllm_instant_kernels.block_verification.verify_blocks`` does; arguments and results are the same."""
    ends_list, all_drafts = ends.tolist(), draft_token_ids.tolist()
    kept_counts, next_tokens = [], []
    for request, (start, end) in enumerate(zip([0, *ends_list], ends_list, strict=False)):
        drafts = all_drafts[start:end]
        num_real = next((i for i, token in enumerate(drafts) if token < 0), len(drafts))
        p = target_probs[start:end]
        if draft_probs is None:
            q = torch.zeros_like(p)
            q[range(num_real), drafts[:num_real]] = 1.0
        else:
            q = draft_probs[start:end]

        weights = [torch.ones((), device=p.device)]
        for i in range(num_real):
            token = drafts[i]
            ratio = p[i, token] / q[i, token] if q[i, token] > 0 else torch.zeros_like(weights[0])
            weights.append((weights[-1] * ratio).clamp(max=1.0))

        kept = 0
        for i in range(1, num_real + 1):
            chance = weights[i]
            if i < num_real:
                if draft_probs is None:
                    mass = weights[i] * (1 - p[i, drafts[i]]).clamp(min=0.0)
                else:
                    mass = (weights[i] * p[i] - q[i]).clamp(min=0.0).sum()
                total = mass + (1 - weights[i])
                chance = mass / total if total > 0 else torch.ones_like(total)
            if uniforms[start + i - 1] < chance:
                kept = i

        kept_counts.append(kept)
        if kept == len(drafts):
            next_tokens.append(-1)
            continue
        residual = (weights[kept] * p[kept] - q[kept]).clamp(min=0.0)
        if kept == num_real or not residual.any():
            residual = p[kept]
        next_tokens.append(int((residual / noise[request]).argmax()))
    return (
        torch.tensor(kept_counts, dtype=torch.int32, device=ends.device),
        torch.tensor(next_tokens, dtype=torch.int32, device=ends.device),
    )
