"""Sample the drafts of seeded requests with the noise that the target will use at the same position.

A seeded request keeps a draft only if it equals the token that the request's generator samples from the target
(``patches.rejection_sampler``). vLLM samples drafts with independent noise, so that draft ``q`` and target ``p`` agree
with probability ``sum(p * q)``. When both take the argmax of their own distribution over the *same* noise they
agree with probability at least ``(1 - TV) / (1 + TV)``, where ``TV`` is the total-variation distance of ``p`` and ``q``
(Daliri, Musco and Suresh 2024, "Coupling without Communication and Drafter-Invariant Speculative Decoding",
arXiv 2408.07978). The answer does not change: it follows from the target and the seed alone.

The noise of draft ``i`` is the ``i``-th draw of a copy of the request's generator; the generator itself does not
advance. vLLM's own sampler turns draws into tokens for drafts as for the target, so that both agree on every device,
and the request's top-k and top-p filter the draft's distribution as they filter the target's.

Requests without a seed are unchanged: rejection sampling accepts more of their drafts. The same holds while vLLM's own
rejection sampler verifies, because it draws acceptance from the generator, and drafts that depend on the same numbers
would change the distribution of answers.
"""

from __future__ import annotations

from typing import Any

from vllm_instant.patches.compat import HasSignature, HasStatements, References, VllmPatch
from vllm_instant.patches.names import PROPOSER

NOISE_ATTRIBUTE = "instant_shared_noise"
"""On a proposer: its ``SharedNoise``."""


class SharedNoise:
    """Samples the drafts of seeded requests; one per proposer.

    Args:
        rejection_sampler: this package's; its ``sampler`` samples the target's tokens.

    """

    def __init__(self, rejection_sampler: Any) -> None:
        self._rejection_sampler = rejection_sampler
        self._copies: dict[int, Any] = {}
        """By batch index: the copy of a generator, advanced by one draw per draft position of this step."""

    def begin_step(self) -> None:
        """Discard the copies of the previous step."""
        self._copies.clear()

    def sample(self, token_ids: Any, logits: Any, sampling_metadata: Any) -> Any:
        """Replace the draft tokens of seeded requests.

        Args:
            token_ids: int64 ``[rows]``, sampled by vLLM.
            logits: float ``[rows, vocabulary]``, already divided by each request's temperature. Rows belong to the
                requests of the batch in order, the same number of rows for each (more than one in parallel drafting).
            sampling_metadata: vLLM's, per request.

        Returns:
            int64 ``[rows]``.

        """
        import torch

        if self._rejection_sampler.instant_plugin.disabled or sampling_metadata.temperature is None:
            return token_ids
        requests = len(sampling_metadata.temperature)
        rows_per_request = len(logits) // requests
        # vLLM makes no generators for greedy requests.
        seeded = sorted(request for request in sampling_metadata.generators if request < requests)
        if not seeded or not rows_per_request:
            return token_ids
        generators: dict[int, Any] = {}
        rows: list[int] = []
        for request in seeded:
            copy = self._copy(request, sampling_metadata.generators[request])
            for row in range(request * rows_per_request, (request + 1) * rows_per_request):
                generators[len(rows)] = copy
                rows.append(row)
        index = torch.tensor(rows, device=logits.device)
        request_of_row = index // rows_per_request
        sampled, _ = self._rejection_sampler.sampler.topk_topp_sampler(
            logits[index].to(torch.float32),  # a copy, which the sampler may overwrite
            generators,
            None if sampling_metadata.top_k is None else sampling_metadata.top_k[request_of_row],
            None if sampling_metadata.top_p is None else sampling_metadata.top_p[request_of_row],
        )
        return token_ids.index_copy(0, index, sampled.to(token_ids.dtype))

    def _copy(self, request: int, generator: Any) -> Any:
        copy = self._copies.get(request)
        if copy is None:
            import torch

            copy = self._copies[request] = torch.Generator(device=generator.device)
            copy.set_state(generator.get_state())
        return copy


def share_noise(runner: Any) -> None:
    """Let a model runner's proposer share noise with its rejection sampler, which must be this package's."""
    proposer = getattr(runner, "drafter", None)
    if hasattr(proposer, "_sample_from_logits"):
        setattr(proposer, NOISE_ATTRIBUTE, SharedNoise(runner.rejection_sampler))


def _propose(propose: Any, proposer: Any, *args: Any, **kwargs: Any) -> Any:
    noise = getattr(proposer, NOISE_ATTRIBUTE, None)
    if noise is not None:
        noise.begin_step()
    return propose(*args, **kwargs)


def _sample_from_logits(sample: Any, proposer: Any, logits: Any, sampling_metadata: Any) -> Any:
    token_ids, draft_probs = sample(logits, sampling_metadata)
    noise = getattr(proposer, NOISE_ATTRIBUTE, None)
    if noise is not None and draft_probs is not None and sampling_metadata.generators:
        token_ids = noise.sample(token_ids, logits, sampling_metadata)
    return token_ids, draft_probs


_PROPOSER = "v1/spec_decode/llm_base_proposer.py"

PATCH = VllmPatch(
    name="shared_noise",
    purpose="drafts of requests with a seed are sampled with the target's noise",
    requirements=(
        HasSignature(_PROPOSER, "SpecDecodeBaseProposer.propose", ("self", "num_speculative_tokens")),
        HasSignature(
            _PROPOSER, "SpecDecodeBaseProposer._sample_from_logits", ("self", "logits", "sampling_metadata"), exact=True
        ),
        References(_PROPOSER, "SpecDecodeBaseProposer._sample_from_logits", ("compute_probs_and_sample_next_token",)),
        # The logits that were sampled from are divided by the temperature in place, and the generators are not used.
        HasStatements(_PROPOSER, "compute_probs_and_sample_next_token", ("logits.div_(temperature.view(-1, 1))",)),
        References("v1/sample/sampler.py", "Sampler.sample", ("topk_topp_sampler", "generators", "top_k", "top_p")),
    ),
    slots=("rejection_sampler",),
    optional=True,
    wraps={
        f"{PROPOSER}:SpecDecodeBaseProposer.propose": _propose,
        f"{PROPOSER}:SpecDecodeBaseProposer._sample_from_logits": _sample_from_logits,
    },
)
