"""Which speculative configurations of vLLM may draft another number of tokens in each step."""

from __future__ import annotations

from typing import Any

from vllm_instant.deployment.resolved import PLUGIN_DRAFTER

VARIABLE_METHODS = frozenset({"ngram", "eagle", "eagle3", "mtp", "draft_model", "dflash", "custom_class"})
"""Methods whose drafters take a number of draft tokens per step, as in vLLM's ``_maybe_disable_dynamic_sd_for_v1``.

The others assert the configured number. Drafter plugins on the host (``custom_class``) get their numbers with the plan.
"""


DEVICE_METHOD = "ngram_gpu"
"""The method of a drafter plugin on the device: the one without a model that vLLM schedules asynchronously."""


def drafts_on_device(speculative_config: Any) -> bool:
    """Whether a drafter plugin drafts on the device (``patches.v2_drafter``)."""
    return (
        speculative_config is not None
        and speculative_config.method == DEVICE_METHOD
        and getattr(speculative_config, "model", None) == PLUGIN_DRAFTER
    )


def fixed_length_reason(vllm_config: Any) -> str | None:
    """Why the drafter must make ``num_speculative_tokens`` drafts in every step; None if the number may vary.

    Verification may use fewer of them in any case.
    """
    speculative, parallel = vllm_config.speculative_config, vllm_config.parallel_config
    if speculative.method not in VARIABLE_METHODS and not drafts_on_device(speculative):
        return f"drafters of method {speculative.method} draft a fixed number of tokens"
    if speculative.parallel_drafting:
        # The rows of its one forward pass are laid out for num_speculative_tokens per request.
        return "parallel drafting computes a fixed number of draft tokens per request"
    if parallel.data_parallel_size > 1 and _has_experts(vllm_config):
        # Ranks with different numbers of draft steps would wait for each other in the layers' collectives.
        return "data-parallel ranks of a mixture-of-experts model must run the same draft steps"
    return None


def _has_experts(vllm_config: Any) -> bool:
    draft = vllm_config.speculative_config.draft_model_config
    return bool(vllm_config.model_config.is_moe or (draft is not None and draft.is_moe))


class UnpaddedLookup:
    """In the place of ``Scheduler.dynamic_sd_lookup``: the same number for every batch size, without padding.

    vLLM pads a request with one token left to compute to ``1 + num_speculative_tokens`` rows when it starts, for the
    CUDA graph of steps in which all requests verify that many drafts. With a draft budget other numbers are as likely.
    And a padded request starts only in a step with room for all of its rows: never, where running requests or the
    limits of a step leave less. With a lookup vLLM does not pad.
    """

    def __init__(self, num_spec_tokens: int) -> None:
        self.num_spec_tokens = num_spec_tokens

    def __getitem__(self, batch_size: int) -> int:
        return self.num_spec_tokens
