"""A drafter plugin beside a draft model on vLLM's V2 model runner: both draft, and the plugin says whose drafts serve.

The host takes no part in that, so that nothing waits for the device. What was not used does no harm: the draft model
computes its keys and values anew from the tokens of each step.
"""

from __future__ import annotations

from typing import Any

from vllm_instant.deployment import deployment_env
from vllm_instant.deployment.circuit_breaker import ContractError
from vllm_instant.interfaces.drafter import DeviceDraftBatch
from vllm_instant.patches.compat import HasSignature, References, VllmPatch
from vllm_instant.patches.names import V2_DRAFT_MODEL, V2_STATES
from vllm_instant.patches.v2_drafter import OWN_ATTRIBUTE, PluginSpeculator, is_hybrid_on_device

CERTAIN = 1e4
"""Logit beside which all others have probability 0, at temperatures up to 100; all dtypes of logits have it."""


def _propose(propose: Any, speculator: Any, input_batch: Any, *args: Any, **kwargs: Any) -> Any:
    """Draft tokens, int64 ``[num_reqs, num_speculative_tokens]``, each row by the model or by the plugin."""
    drafts = propose(input_batch, *args, **kwargs)
    own: PluginSpeculator | None = getattr(speculator, OWN_ATTRIBUTE, None)
    if own is None:
        return drafts
    # Of the arguments behind ``input_batch``, the fifth and the sixth one.
    num_sampled = kwargs["num_sampled"] if "num_sampled" in kwargs else args[4]
    num_rejected = kwargs["num_rejected"] if "num_rejected" in kwargs else args[5]
    planned, is_dummy = kwargs.get("num_speculative_tokens"), bool(kwargs.get("dummy_run"))
    batch = own.batch_of(input_batch, num_sampled, num_rejected, planned, is_dummy)
    found = own.ask(batch) if batch is not None else None
    if batch is None or found is None:
        return drafts
    chosen = own.drafter.call("prefers_own", lambda drafter: _checked(drafter, batch), None)
    if chosen is None:
        return drafts
    return mixed(drafts, found[:, : drafts.shape[1]], chosen, speculator.draft_logits, input_batch.idx_mapping)


def _checked(drafter: Any, batch: DeviceDraftBatch) -> Any:
    import torch

    chosen = drafter.prefers_own(batch)
    if tuple(chosen.shape) != (len(batch.request_ids),) or chosen.dtype != torch.bool:
        raise ContractError(f"bool [{len(batch.request_ids)}] was due, found {chosen.dtype} {list(chosen.shape)}")
    return chosen


def mixed(drafts: Any, own: Any, chosen: Any, draft_logits: Any, rows: Any) -> Any:
    """Replace the chosen rows of ``drafts``, in place.

    Args:
        drafts: int64 ``[requests, drafts]``, the model's.
        own: the same of the plugin.
        chosen: bool ``[requests]``, whose drafts are the plugin's.
        draft_logits: ``[max_num_seqs, drafts, vocab]`` or None: what vLLM verifies the model's drafts with. Those of
            chosen rows become certain.
        rows: int64 ``[requests]``, the row of each request in ``draft_logits``.

    """
    import torch

    own = own if draft_logits is None else own.clamp(max=draft_logits.shape[2] - 1)
    drafts.copy_(torch.where(chosen[:, None], own, drafts))
    if draft_logits is not None:
        steps = torch.arange(drafts.shape[1], device=drafts.device)
        at = rows[:, None].expand_as(own), steps.expand_as(own), own
        draft_logits.index_put_(at, torch.where(chosen[:, None], CERTAIN, draft_logits[at]).to(draft_logits.dtype))
    return drafts


def _init_request_state(initialize: Any, state: Any, *args: Any, **kwargs: Any) -> None:
    """Keep all tokens of all requests on the device, as for vLLM's own lookup; otherwise they are on the host."""
    deployment = deployment_env.get_deployment()
    if deployment is not None and is_hybrid_on_device(deployment):
        kwargs["use_dense_all_token_ids"] = True
    initialize(*args, **kwargs)


_FILE = "v1/worker/gpu/spec_decode/standalone_ar/speculator.py"
_CLASS = "StandaloneARSpeculator"
_STATES = "v1/worker/gpu/states.py"

PATCH = VllmPatch(
    name="v2_hybrid",
    purpose="a drafter plugin beside a draft model, on the V2 model runner",
    requirements=(
        HasSignature(
            _FILE,
            f"{_CLASS}.propose",
            (
                "self",
                "input_batch",
                "attn_metadata",
                "slot_mappings",
                "last_hidden_states",
                "aux_hidden_states",
                "num_sampled",
                "num_rejected",
            ),
        ),
        References(_FILE, f"{_CLASS}.propose", ("draft_tokens",)),
        References("v1/worker/gpu/spec_decode/speculator.py", "DraftModelSpeculator.__init__", ("draft_logits",)),
        References(_STATES, "RequestState.__init__", ("use_dense_all_token_ids", "all_token_ids")),
        References("v1/worker/gpu/model_runner.py", "GPUModelRunner.__init__", ("use_dense_all_token_ids",)),
    ),
    slots=("drafter",),
    optional=True,
    wraps={
        f"{V2_DRAFT_MODEL}:{_CLASS}.propose": _propose,
        f"{V2_STATES}:RequestState.__init__": _init_request_state,
    },
)
