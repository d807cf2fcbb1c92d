"""Rejection samplers with a fault each, of the kinds that are easily made: `vllm-instant verify` has to find them."""

import torch

from vllm_instant import RejectionSampler
from vllm_instant.speculation.verification import pad_drafts
from vllm_instant_plugins.samplers.draws import draw
from vllm_instant_plugins.samplers.token import TokenSampler


class AcceptAlways(RejectionSampler):
    """Keeps every draft token, whatever the target says."""

    def verify(self, step):
        rows = pad_drafts(step.draft_token_ids, step.num_draft_tokens)
        return rows.num_real, self._after(step, rows, rows.num_real)

    @staticmethod
    def _after(step, rows, num_kept):
        row = rows.index.gather(1, num_kept.clamp(max=rows.index.shape[1] - 1)[:, None])[:, 0]
        return draw(step.target_logits.softmax(-1)[row])


class WrongResidual(TokenSampler):
    """Replaces a refused draft by a draw from the target, instead of what the draft has left of it."""

    def verify(self, step):
        num_kept, _ = super().verify(step)
        rows = pad_drafts(step.draft_token_ids, step.num_draft_tokens)
        return num_kept, AcceptAlways._after(step, rows, num_kept)


class OffByOne(TokenSampler):
    """Where the whole draft is kept, takes the last token back and draws it from the row before its own."""

    def verify(self, step):
        num_kept, following = super().verify(step)
        rows = pad_drafts(step.draft_token_ids, step.num_draft_tokens)
        whole = (num_kept == rows.number) & (rows.number > 1)
        wrong = AcceptAlways._after(step, rows, (num_kept - 2).clamp(min=0))
        return num_kept - whole.long(), torch.where(whole, wrong, following)


class Raising(TokenSampler):
    """Works for some steps, then raises."""

    calls = 0

    def verify(self, step):
        self.calls += 1
        if self.calls == 5:
            raise RuntimeError("sampler failed on purpose")
        return super().verify(step)


class OutOfRange(TokenSampler):
    """Claims to have kept more drafts than there are."""

    def verify(self, step):
        num_kept, following = super().verify(step)
        return num_kept + 99, following


PLANTED = {"accept_always": AcceptAlways, "wrong_residual": WrongResidual, "off_by_one": OffByOne}
"""By the names of their plugins."""
