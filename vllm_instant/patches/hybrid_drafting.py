"""A drafter plugin beside vLLM's draft model, on the V1 runner under synchronous scheduling.

In each step the plugin assigns requests to the draft model or drafts for them itself. ``patches.draft_model_skip`` runs
the draft model, only if a request is assigned to it and only for as many tokens as the longest assignment. Where the
draft model samples its tokens (``draft_sample_method = "probabilistic"``) vLLM verifies drafts against the
distributions that they were drawn from; the plugin's tokens then get one-hot distributions.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from vllm_instant.deployment import deployment_env
from vllm_instant.deployment.circuit_breaker import ContractError, GuardedPlugin
from vllm_instant.deployment.plain import whole
from vllm_instant.deployment.resolved import installed_plugin
from vllm_instant.interfaces.drafter import Draft, DraftAssignment, DraftRequest, HybridDrafter
from vllm_instant.interfaces.speculation import UNAFFORDABLE
from vllm_instant.patches.compat import HasSignature, References, VllmPatch
from vllm_instant.patches.draft_model_skip import DraftModelCatchUp, can_be_skipped, catch_up_of
from vllm_instant.patches.drafter import checked_draft, read_only
from vllm_instant.patches.names import MODEL_RUNNER, PLAN_ATTRIBUTE, V2_MODEL_RUNNER
from vllm_instant.patches.plugin_factory import (
    PluginStartError,
    build_guarded,
    context_of,
    uses_drafter_plugin,
)
from vllm_instant.speculation.draft_plan import DraftPlan

HYBRID_ATTRIBUTE = "instant_hybrid_drafting"
"""On a model runner: its ``HybridDraftRunner``, or None."""


class HybridDraftRunner:
    """Splits one worker's drafting between a plugin and the draft model.

    Args:
        runner: vLLM's ``GPUModelRunner``.
        drafter: the plugin behind its breaker.
        draft_model: the runner's draft model.
        vocab_size: tokens of the target's vocabulary.

    """

    def __init__(
        self, runner: Any, drafter: GuardedPlugin[HybridDrafter], draft_model: DraftModelCatchUp, vocab_size: int
    ) -> None:
        self.runner = runner
        self.drafter = drafter
        self.draft_model = draft_model
        self.vocab_size = vocab_size
        self.draft_steps = 0
        """Forward passes of the draft model in the newest step."""
        self.uncached_tokens = 0
        """Tokens that the draft model read first in that step, because they came while it did not run."""

    def propose(self, run_model: Any, scheduler_output: Any, plan: DraftPlan, arguments: tuple[Any, ...]) -> Any:
        """Drafts for the rows of the batch, a list of token ids per row.

        Args:
            run_model: ``propose_draft_token_ids`` of this runner without this patch.
            scheduler_output: the step.
            plan: what the scheduler decided about its drafts.
            arguments: of ``propose_draft_token_ids``, after ``scheduler_output``.

        """
        batch = self.runner.input_batch
        if not plan.draft_model_runs:
            plan = replace(plan, draft_cost=replace(plan.draft_cost, draft_fixed=UNAFFORDABLE))
        requests = self._requests(scheduler_output, plan, arguments[0]) if any(plan.num_draft_tokens.values()) else []
        # When the plugin is disabled the draft model does everything.
        otherwise = [DraftAssignment(num_draft_tokens=request.max_draft_tokens) for request in requests]
        assignments = self.drafter.call("assign", lambda drafter: self._assign(drafter, requests, plan), otherwise)
        by_model = {
            request.request_id: assignment.num_draft_tokens
            for request, assignment in zip(requests, assignments, strict=True)
            if assignment.num_draft_tokens and plan.draft_model_runs
        }
        passes = max(by_model.values(), default=0)
        self.draft_steps = passes
        asked = copy.copy(scheduler_output)
        asked.num_spec_tokens_to_schedule = passes
        setattr(asked, PLAN_ATTRIBUTE, replace(plan, num_draft_tokens=by_model))
        drafts: list[list[int]] = run_model(asked, *arguments)
        self.uncached_tokens = self.draft_model.read_tokens
        rows = batch.req_id_to_index
        if by_model:
            drafted = {request_id: list(drafts[rows[request_id]]) for request_id in by_model}
            self.drafter.call("on_model_drafts", lambda drafter: drafter.on_model_drafts(drafted), None)
        own = {
            rows[request.request_id]: list(assignment.own)
            for request, assignment in zip(requests, assignments, strict=True)
            # The draft model drafts nothing for a request that it is still catching up with.
            if assignment.own and not drafts[rows[request.request_id]]
        }
        for row, tokens in own.items():
            drafts[row] = tokens
        if self.runner._draft_probs is not None and own:
            self._set_one_hot(own)
        return drafts

    def forget(self, request_ids: Iterable[str]) -> None:
        """These requests have ended."""
        for request_id in request_ids:
            self.drafter.call("forget", functools.partial(_forget, request_id=request_id), None)

    def _requests(self, scheduler_output: Any, plan: DraftPlan, sampled: Any) -> list[DraftRequest]:
        """The requests that may get drafts, with the tokens of this step."""
        runner, batch = self.runner, self.runner.input_batch
        capacity = batch.token_ids_cpu.shape[1]
        discarded = runner.discard_request_mask.np
        missed = self.draft_model.missed(scheduler_output)
        tokens_of_all = read_only(batch.token_ids_cpu)
        requests = []
        for row, tokens in enumerate(sampled.cpu().numpy()):
            request_id = batch.req_ids[row]
            length = plan.num_draft_tokens.get(request_id, 0)
            if not length or discarded[row]:
                continue
            new = tokens[(tokens >= 0) & (tokens < batch.vocab_size)]
            before = int(batch.num_tokens_no_spec[row])
            stop = min(before + len(new), capacity)
            length = min(length, capacity - stop)
            if not len(new) or length <= 0:
                continue
            # vLLM writes the same tokens to the same place after the draft model has run.
            batch.token_ids_cpu[row, before:stop] = new[: stop - before]
            requests.append(
                DraftRequest(
                    request_id,
                    tokens_of_all[row, :stop],
                    int(batch.num_prompt_tokens[row]),
                    length,
                    plan.cache_salts.get(request_id, ""),
                    request_id in plan.fixed,
                    missed[row],
                )
            )
        return requests

    def _assign(
        self, drafter: HybridDrafter, requests: Sequence[DraftRequest], plan: DraftPlan
    ) -> list[DraftAssignment]:
        """The plugin's assignments, after a check of everything that could harm the engine."""
        if not requests:
            return []
        assignments = drafter.assign(tuple(requests), plan.draft_cost)
        if len(assignments) != len(requests):
            raise ContractError(f"expected assignments for {len(requests)} requests, found {len(assignments)}")
        checked = []
        for request, assignment in zip(requests, assignments, strict=True):
            length = whole(assignment.num_draft_tokens, "num_draft_tokens")
            if not 0 <= length <= request.max_draft_tokens:
                raise ContractError(f"num_draft_tokens must lie in 0..{request.max_draft_tokens}, found {length}")
            own = checked_draft(assignment.own, request.max_draft_tokens, self.vocab_size)
            tokens = own.token_ids if isinstance(own, Draft) else own
            checked.append(DraftAssignment(tokens, length))
        return checked

    def _set_one_hot(self, own: Mapping[int, Sequence[int]]) -> None:
        """Replace the draft distributions at the plugin's tokens by one-hot distributions."""
        runner = self.runner
        max_draft_tokens = max(len(tokens) for tokens in own.values())
        probabilities = runner._draft_probs
        missing = max_draft_tokens - probabilities.shape[1]
        if missing > 0:
            shape = (probabilities.shape[0], missing, probabilities.shape[2])
            import torch

            probabilities = torch.cat([probabilities, probabilities.new_zeros(shape)], dim=1)
        for row, tokens in own.items():
            probabilities[row, : len(tokens)] = 0.0
            for position, token in enumerate(tokens):
                probabilities[row, position, token] = 1.0
        runner._draft_probs = probabilities


def _forget(drafter: HybridDrafter, request_id: str) -> None:
    drafter.forget(request_id)


def _build(runner: Any) -> HybridDraftRunner | None:
    """The hybrid drafting of this runner, if its deployment names a drafter that brings a draft model.

    Raises:
        PluginStartError: the drafter is no HybridDrafter, or the draft model cannot be skipped.

    """
    deployment = deployment_env.get_deployment()
    speculative = runner.speculative_config
    if deployment is None or speculative is None:
        return None
    plugin = installed_plugin(deployment, "drafter").plugin
    if plugin.build is None or plugin.engine_arguments is None or not uses_drafter_plugin(deployment, speculative):
        return None
    if runner.use_async_scheduling or not can_be_skipped(runner):
        raise PluginStartError(
            f"plugin {plugin.name} of slot drafter works beside a draft model that can be skipped in steps: "
            "it needs synchronous scheduling (--no-async-scheduling), no data, pipeline or context parallelism, and a "
            "draft model of vLLM's method draft_model"
        )
    context = context_of(runner.vllm_config, deployment)
    guarded = build_guarded("drafter", deployment, context)
    if guarded is None:
        return None
    if not isinstance(guarded.instance, HybridDrafter):
        raise PluginStartError(
            f"plugin {plugin.name} of slot drafter cannot start: it brings a draft model, so that its "
            f"{type(guarded.instance).__name__} must be a vllm_instant.HybridDrafter"
        )
    return HybridDraftRunner(runner, guarded, catch_up_of(runner), context.vocab_size)


def _initialize_kv_cache(initialize: Any, runner: Any, *args: Any, **kwargs: Any) -> Any:
    """Build the plugin once the draft model is loaded and its KV cache laid out, before the first request."""
    result = initialize(*args, **kwargs)
    setattr(runner, HYBRID_ATTRIBUTE, _build(runner))
    return result


def _propose(propose: Any, runner: Any, scheduler_output: Any, *arguments: Any) -> Any:
    hybrid = getattr(runner, HYBRID_ATTRIBUTE, None)
    plan = getattr(scheduler_output, PLAN_ATTRIBUTE, None)
    if hybrid is None or plan is None:
        return propose(scheduler_output, *arguments)
    return hybrid.propose(propose, scheduler_output, plan, arguments)


def _update_states(update: Any, runner: Any, scheduler_output: Any) -> Any:
    """Forget finished requests here and not while drafting: an engine's last step has no tokens and drafts nothing."""
    hybrid = getattr(runner, HYBRID_ATTRIBUTE, None)
    if hybrid is not None:
        # Sorted, because the order of a set differs between processes and the ranks must do the same.
        hybrid.forget(sorted(scheduler_output.finished_req_ids))
    return update(scheduler_output)


def _init_v2_runner(initialize: Any, runner: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
    """Refuse the V2 runner, which would run the draft model without the plugin."""
    deployment, speculative = deployment_env.get_deployment(), vllm_config.speculative_config
    if deployment is not None and speculative is not None:
        plugin = installed_plugin(deployment, "drafter").plugin
        is_hybrid = plugin.build is not None and plugin.engine_arguments is not None and plugin.build_on_device is None
        if is_hybrid and uses_drafter_plugin(deployment, speculative):
            raise PluginStartError(
                f"plugin {plugin.name} of slot drafter needs vLLM's V1 model runner: set VLLM_USE_V2_MODEL_RUNNER=0"
            )
    initialize(vllm_config, *args, **kwargs)


_RUNNER = "v1/worker/gpu_model_runner.py"

PATCH = VllmPatch(
    name="hybrid_drafting",
    purpose="a drafter plugin beside a draft model",
    requirements=(
        HasSignature(
            _RUNNER, "GPUModelRunner.propose_draft_token_ids", ("self", "scheduler_output", "sampled_token_ids")
        ),
        HasSignature("v1/worker/gpu/model_runner.py", "GPUModelRunner.__init__", ("self", "vllm_config")),
        HasSignature(_RUNNER, "GPUModelRunner.initialize_kv_cache", ("self", "kv_cache_config")),
        HasSignature(_RUNNER, "GPUModelRunner._update_states", ("self", "scheduler_output"), exact=True),
        References(_RUNNER, "GPUModelRunner.execute_model", ("_update_states",)),
        References(_RUNNER, "GPUModelRunner._get_spec_decode_draft_probs", ("_draft_probs", "num_draft_tokens")),
        References(_RUNNER, "GPUModelRunner.sample_tokens", ("propose_draft_token_ids", "_bookkeeping_sync")),
        References("v1/worker/gpu_input_batch.py", "InputBatch", ("num_tokens_no_spec", "token_ids_cpu", "req_ids")),
    ),
    slots=("drafter",),
    optional=True,
    wraps={
        f"{MODEL_RUNNER}:GPUModelRunner.propose_draft_token_ids": _propose,
        f"{MODEL_RUNNER}:GPUModelRunner.initialize_kv_cache": _initialize_kv_cache,
        f"{MODEL_RUNNER}:GPUModelRunner._update_states": _update_states,
        f"{V2_MODEL_RUNNER}:GPUModelRunner.__init__": _init_v2_runner,
    },
)
