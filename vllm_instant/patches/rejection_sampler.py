"""Rejection samplers that plugins bring, on vLLM's V1 runner; on the V2 runner, vLLM's own block verification.

vLLM's ``RejectionSampler`` is replaced by a subclass that processes logits as vLLM does and then asks the plugin which
drafts are accepted. Two kinds of requests are not left to the plugin, because the target alone decides about them:

- **greedy** requests keep the drafts that are the target's first choice;
- requests with a **seed** produce the tokens that they would produce without speculation: at each position the target's
  token is sampled with the request's generator as vLLM's sampler does without drafts, and a draft is kept if it is that
  token (drafts are sampled with the same noise, see ``patches.shared_noise``). The same seed gives the same answer
  whatever was drafted; a rule that depends on the drafts cannot give that.

A lossy plugin may decide about both, where its user says so (``verify_greedy`` and ``keeps_seeds`` of the interface).

Requests with **structured output** lose drafts that their grammar forbids. If a draft that was sampled from a draft
model's distribution is discarded because of its value and replaced by another sample, the distribution of the answer
changes. Drafts of such requests are therefore verified with one-hot draft distributions, which is exact however the
drafts were made.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from vllm_instant.deployment import deployment_env
from vllm_instant.deployment.circuit_breaker import ContractError, GuardedPlugin
from vllm_instant.deployment.resolved import installed_plugin
from vllm_instant.interfaces.deployment import Deployment
from vllm_instant.interfaces.rejection_sampler import RejectionSampler, VerificationBatch
from vllm_instant.patches.compat import HasAttribute, HasSignature, References, VllmPatch
from vllm_instant.patches.names import MODEL_RUNNER, V2_REJECTION_SAMPLER
from vllm_instant.patches.plugin_factory import PluginStartError, build_guarded, context_of
from vllm_instant.patches.shared_noise import share_noise
from vllm_instant.speculation.verification import PaddedDrafts, pad_drafts

logger = logging.getLogger("vllm.instant")

PADDING = -1
SAMPLER_ATTRIBUTE = "instant_plugin"
"""On a rejection sampler: the plugin behind its breaker."""


def sampler_class(base: Any, constrain: Any) -> Any:
    """The subclass of vLLM's ``RejectionSampler``.

    Args:
        base: vLLM's class.
        constrain: vLLM's ``apply_sampling_constraints``: temperature, top-k and top-p.

    """
    import torch

    class InstantRejectionSampler(base):
        """Verifies drafts as the deployment's plugin says; as vLLM does once the plugin is disabled."""

        instant_plugin: GuardedPlugin[RejectionSampler]

        def forward(self, metadata: Any, draft_probs: Any, logits: Any, sampling_metadata: Any) -> Any:
            # Greedy batches follow vLLM's rule; once the plugin is disabled vLLM verifies everything. A step without
            # drafts, which arrives here under asynchronous scheduling only, has no draft logits to index.
            no_drafts = not any(metadata.num_draft_tokens)
            is_vllms = sampling_metadata.all_greedy and not self._decides_greedy
            if is_vllms or self.instant_plugin.disabled or no_drafts:
                return super().forward(metadata, draft_probs, logits, sampling_metadata)
            if not getattr(self.instant_plugin.instance, "keeps_seeds", True):
                sampling_metadata = replace(sampling_metadata, generators={})
            wants_logprobs = sampling_metadata.max_num_logprobs is not None
            # Indexing copies, so that the following steps may overwrite it.
            target = logits[metadata.target_logits_indices].to(torch.float32)
            raw = target.clone() if wants_logprobs and not self.is_processed_logprobs_mode else None
            target = self.apply_logits_processors(target, sampling_metadata, metadata)
            target = constrain(target, metadata.cu_num_draft_tokens, sampling_metadata)
            processed = target.clone() if wants_logprobs and self.is_processed_logprobs_mode else None

            kept = self._verified(metadata, draft_probs, target, sampling_metadata)
            if kept is None:
                # The plugin may have overwritten the draft distributions. Without them vLLM verifies as if each draft
                # had been certain, which is exact however the drafts were made.
                return super().forward(metadata, None, logits, sampling_metadata)
            num_kept, following, seeded = kept

            # Seeded requests have drawn from their generators above; they draw once more only for a bonus token.
            bonus = self.sampler(
                logits=logits[metadata.bonus_logits_indices],
                sampling_metadata=replace(sampling_metadata, max_num_logprobs=-1, generators=seeded),
                predict_bonus_token=True,
                logprobs_mode_override="processed_logits" if self.is_processed_logprobs_mode else "raw_logits",
            )
            rows = pad_drafts(metadata.draft_token_ids.to(torch.int64), metadata.num_draft_tokens)
            output = assembled(rows, num_kept, following, bonus.sampled_token_ids)
            logprobs = None
            if wants_logprobs:
                logprobs = self._get_logprobs_tensors(
                    sampling_metadata.max_num_logprobs,
                    metadata,
                    logits,
                    raw if processed is None else processed,
                    bonus.logprobs_tensors.logprobs,
                    output,
                )
            return type(bonus)(sampled_token_ids=output, logprobs_tensors=logprobs)

        def _verified(self, metadata: Any, draft_probs: Any, target: Any, sampling: Any) -> Any:
            """How many drafts each request keeps, the token after them, and the generators still needed.

            None when the plugin failed; then no generator has been used yet.
            """
            drafts = metadata.draft_token_ids.to(torch.int64)
            counts = metadata.num_draft_tokens
            generators = sampling.generators
            plain = sampling.all_random and not generators
            if sampling.all_greedy:
                answer = self._of_greedy(drafts, counts, target)
                return None if answer is None else (*answer, generators)
            # The plugin may overwrite its logits, which greedy and seeded requests still need below.
            step = VerificationBatch(drafts.clone(), list(counts), target if plain else target.clone(), draft_probs)
            answer = self.instant_plugin.call(
                "verify", lambda plugin: checked(plugin.verify(step), counts, target), None
            )
            if answer is None or plain:
                return None if answer is None else (*answer, generators)
            num_kept, following = answer
            if not sampling.all_random:
                of_greedy = self._of_greedy(drafts, counts, target)
                if of_greedy is None:
                    return None
                is_greedy = sampling.temperature == 0
                num_kept = torch.where(is_greedy, of_greedy[0], num_kept)
                following = torch.where(is_greedy, of_greedy[1], following)
            needed = dict(generators)
            start = 0
            for request, count in enumerate(counts):
                if count and request in generators:
                    rows = slice(start, start + count)
                    kept, token = self._with_seed(drafts[rows].tolist(), target[rows], generators[request])
                    num_kept[request], following[request] = kept, token
                    if kept < count:
                        del needed[request]
                start += count
            return num_kept, following, needed

        @property
        def _decides_greedy(self) -> bool:
            return hasattr(self.instant_plugin.instance, "verify_greedy")

        def _of_greedy(self, drafts: Any, counts: Any, target: Any) -> Any:
            """As ``verify``, for the greedy requests of the batch; None when the plugin failed."""
            if not self._decides_greedy:
                return greedy(pad_drafts(drafts, counts), target)
            step = VerificationBatch(drafts.clone(), list(counts), target.clone(), None)

            def verified(plugin: Any) -> Any:
                return checked(plugin.verify_greedy(step), counts, target)

            return self.instant_plugin.call("verify_greedy", verified, None)

        def _with_seed(self, drafts: list[int], target: Any, generator: Any) -> tuple[int, int]:
            """How many drafts equal the tokens sampled with the generator, and the sampled token after them."""
            for position, draft in enumerate(drafts):
                row = target[position : position + 1].clone()
                token = int(self.sampler.topk_topp_sampler(row, {0: generator}, None, None)[0])
                if token != draft:
                    return position, token
            return len(drafts), 0

    return InstantRejectionSampler


def checked(answer: Any, num_draft_tokens: Sequence[int], target_logits: Any) -> tuple[Any, Any]:
    """A plugin's verdict, after a check of everything that could harm the engine.

    Values are checked on a CPU only: on other devices that would synchronise with the device in every step, so that
    they are limited to what is valid.

    Args:
        answer: of the plugin.
        num_draft_tokens: of each request.
        target_logits: float32 ``[tokens, vocabulary]``.

    Raises:
        ContractError: when shapes, types or values differ from the interface's.

    """
    import torch

    num_kept, following = answer
    batch, vocabulary = len(num_draft_tokens), target_logits.shape[1]
    for name, tensor in (("num_kept", num_kept), ("replacements", following)):
        if not isinstance(tensor, torch.Tensor) or tensor.device != target_logits.device:
            found = tensor.device if isinstance(tensor, torch.Tensor) else type(tensor).__name__
            raise ContractError(f"{name} must be a tensor on {target_logits.device}, found {found}")
        if tuple(tensor.shape) != (batch,) or tensor.dtype != torch.int64:
            raise ContractError(f"{name} must be int64 of shape ({batch},), found {tensor.dtype} {tuple(tensor.shape)}")
    if num_kept.device.type == "cpu":
        counts = torch.tensor(num_draft_tokens)
        if bool(((num_kept < 0) | (num_kept > counts)).any()):
            raise ContractError(f"num_kept must lie in 0..{list(num_draft_tokens)}, found {num_kept.tolist()}")
        tokens = following[num_kept < counts]
        if bool(((tokens < 0) | (tokens >= vocabulary)).any()):
            raise ContractError(f"token ids must lie in 0..{vocabulary - 1}, found others")
        return num_kept.clone(), following.clone()
    return num_kept.clamp(min=0), following.clamp(0, vocabulary - 1)


def greedy(rows: PaddedDrafts, target_logits: Any) -> tuple[Any, Any]:
    """Drafts that are the target's first choice are kept: how many, and the first choice after them; int64 each."""
    first_choice = target_logits.argmax(-1)[rows.index]
    num_kept = ((first_choice == rows.token_ids) & rows.is_real).cumprod(1).sum(1)
    position = num_kept.clamp(max=rows.index.shape[1] - 1)
    return num_kept, first_choice.gather(1, position[:, None])[:, 0]


def assembled(rows: PaddedDrafts, num_kept: Any, following: Any, bonus_token_ids: Any) -> Any:
    """Kept drafts and the token after them, int32 ``[batch, max_drafts + 1]``, padded with -1.

    Args:
        rows: the drafts.
        num_kept: int64 ``[batch]``.
        following: int64 ``[batch]``, the token in the place of the first rejected draft.
        bonus_token_ids: integers ``[batch, 1]``, the token after the drafts where all are kept.

    """
    import torch

    batch, max_drafts = rows.index.shape
    num_kept = torch.minimum(num_kept, rows.number)
    output = torch.full((batch, max_drafts + 1), PADDING, dtype=torch.int32, device=num_kept.device)
    position = torch.arange(max_drafts, device=num_kept.device)
    output[:, :max_drafts] = torch.where(position < num_kept[:, None], rows.token_ids, PADDING)
    last = torch.where(num_kept == rows.number, bonus_token_ids[:, 0].to(torch.int64), following)
    output.scatter_(1, num_kept[:, None], last[:, None].to(torch.int32))
    return output


def certain_rows(draft_probs: Any, rows: Any, token_ids: Any) -> Any:
    """``draft_probs`` with all weight on the drafted token in ``rows``; a copy."""
    draft_probs = draft_probs.clone()
    draft_probs[rows] = 0
    draft_probs[rows, token_ids] = 1
    return draft_probs


def _install_sampler(runner: Any) -> None:
    """Let a model runner's rejection sampler ask the deployment's plugin, if there are both."""
    original = getattr(runner, "rejection_sampler", None)
    deployment = deployment_env.get_deployment()
    if original is None or deployment is None:
        return
    method = runner.speculative_config.rejection_sample_method
    if method != "standard":
        _refuse_if_lossy(deployment, f"speculative_config says rejection_sample_method = {method!r}")
        return
    plugin = build_guarded("rejection_sampler", deployment, context_of(runner.vllm_config, deployment))
    if plugin is not None:
        from vllm.v1.sample.rejection_sampler import apply_sampling_constraints

        # The object stays what vLLM's constructor made of it; only what it does is ours.
        original.__class__ = sampler_class(type(original), apply_sampling_constraints)
        setattr(original, SAMPLER_ATTRIBUTE, plugin)
        # Tokens that are sampled with other noise must not be verified against drafts of the generator's.
        if getattr(plugin.instance, "keeps_seeds", True):
            share_noise(runner)


def _refuse_if_lossy(deployment: Deployment, reason: str) -> None:
    choice = deployment.slots["rejection_sampler"]
    if installed_plugin(deployment, "rejection_sampler").plugin.lossy:
        raise PluginStartError(f"plugin {choice.plugin} of slot rejection_sampler cannot serve: {reason}")
    logger.info("vLLM's own rejection sampler serves: %s", reason)


def _init_runner(initialize: Any, runner: Any, *args: Any, **kwargs: Any) -> None:
    initialize(*args, **kwargs)
    _install_sampler(runner)


def _get_spec_decode_draft_probs(get: Any, runner: Any, spec_decode_metadata: Any) -> Any:
    """Verify drafts of requests with structured output as certain ones (see above)."""
    draft_probs = get(spec_decode_metadata)
    if draft_probs is None:
        return None
    rows: list[int] = []
    start = 0
    for request_id, count in zip(runner.input_batch.req_ids, spec_decode_metadata.num_draft_tokens, strict=False):
        sampling = runner.requests[request_id].sampling_params
        if sampling is not None and sampling.structured_outputs is not None:
            rows.extend(range(start, start + count))
        start += count
    if not rows:
        return draft_probs
    return certain_rows(draft_probs, rows, spec_decode_metadata.draft_token_ids[rows].clamp(min=0).long())


def _init_v2_sampler(initialize: Any, instance: Any, sampler: Any, spec_config: Any, *args: Any, **kwargs: Any) -> None:
    """The V2 runner verifies on the device with kernels of its own, block verification among them."""
    initialize(sampler, spec_config, *args, **kwargs)
    deployment = deployment_env.get_deployment()
    if deployment is None:
        return
    chosen = deployment.slots["rejection_sampler"].plugin
    if chosen == "block" and spec_config.rejection_sample_method == "standard":
        instance.use_block_verification = True
    elif chosen not in V2_SAMPLERS:
        raise PluginStartError(
            f"plugin {chosen} of slot rejection_sampler needs vLLM's V1 model runner: "
            "set VLLM_USE_V2_MODEL_RUNNER=0, or choose block or token"
        )


V2_SAMPLERS = frozenset({"block", "token", "native"})
"""Plugins of slot rejection_sampler that the V2 runner's own kernels stand for."""

_RUNNER = "v1/worker/gpu_model_runner.py"
_SAMPLER = "v1/sample/rejection_sampler.py"
_V2_SAMPLER = "v1/worker/gpu/spec_decode/rejection_sampler.py"

PATCH = VllmPatch(
    name="rejection_sampler",
    purpose="rejection samplers that plugins bring; seeds that hold whatever is drafted",
    requirements=(
        References(_RUNNER, "GPUModelRunner.__init__", ("rejection_sampler", "speculative_config", "sampler")),
        HasSignature(
            _RUNNER, "GPUModelRunner._get_spec_decode_draft_probs", ("self", "spec_decode_metadata"), exact=True
        ),
        References(_RUNNER, "GPUModelRunner._sample", ("rejection_sampler", "sampling_metadata")),
        HasSignature(
            _SAMPLER,
            "RejectionSampler.forward",
            ("self", "metadata", "draft_probs", "logits", "sampling_metadata"),
            exact=True,
        ),
        HasSignature(
            _SAMPLER,
            "RejectionSampler.apply_logits_processors",
            ("self", "logits", "sampling_metadata", "metadata"),
            exact=True,
        ),
        HasSignature(
            _SAMPLER,
            "RejectionSampler._get_logprobs_tensors",
            (
                "self",
                "max_num_logprobs",
                "metadata",
                "logits",
                "target_logits",
                "bonus_logits",
                "sampled_token_ids",
            ),
            exact=True,
        ),
        References(_SAMPLER, "RejectionSampler.__init__", ("sampler", "is_processed_logprobs_mode")),
        HasSignature(
            _SAMPLER,
            "apply_sampling_constraints",
            ("logits", "cu_num_draft_tokens", "sampling_metadata"),
            exact=True,
        ),
        References("v1/sample/sampler.py", "Sampler.__init__", ("topk_topp_sampler",)),
        HasSignature("v1/sample/sampler.py", "Sampler.forward", ("self", "logits", "sampling_metadata")),
        HasAttribute("v1/sample/metadata.py", "SamplingMetadata.generators"),
        HasAttribute("v1/spec_decode/metadata.py", "SpecDecodeMetadata.target_logits_indices"),
        References(_V2_SAMPLER, "RejectionSampler.__init__", ("use_block_verification", "rejection_sample_method")),
    ),
    slots=("rejection_sampler",),
    wraps={
        f"{MODEL_RUNNER}:GPUModelRunner.__init__": _init_runner,
        f"{MODEL_RUNNER}:GPUModelRunner._get_spec_decode_draft_probs": _get_spec_decode_draft_probs,
        f"{V2_REJECTION_SAMPLER}:RejectionSampler.__init__": _init_v2_sampler,
    },
)
