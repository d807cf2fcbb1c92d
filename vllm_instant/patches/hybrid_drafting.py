"""A drafter plugin beside vLLM's draft model, on the V1 runner under synchronous scheduling.

Step by step the plugin says which requests the draft model serves. The draft model is run by
``patches.draft_skipping``, only when a request wants it and only as far as one does. Where the model's tokens are
sampled (``draft_sample_method = "probabilistic"``) vLLM verifies drafts against the distributions that they were drawn
from; the plugin's tokens then carry distributions with all weight on one token.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from types import ModuleType
from typing import Any

from vllm_instant.deployment import deployment_env
from vllm_instant.deployment.circuit_breaker import ContractError, GuardedPlugin
from vllm_instant.deployment.resolved import installed_plugin
from vllm_instant.interfaces.drafter import Draft, DraftAssignment, DraftRequest, HybridDrafter
from vllm_instant.patches.compat import HasSignature, References, VllmPatch
from vllm_instant.patches.draft_model_skip import DraftModelCatchUp, can_be_skipped, keeper_of
from vllm_instant.patches.drafter import checked_draft
from vllm_instant.patches.import_hooks import when_imported
from vllm_instant.patches.plugin_factory import (
    PluginStartError,
    build_guarded,
    context_of,
    uses_drafter_plugin,
)
from vllm_instant.patches.scheduler import PLAN_ATTRIBUTE
from vllm_instant.speculation.draft_plan import DraftPlan

MODEL_RUNNER_MODULE = "vllm.v1.worker.gpu_model_runner"
SHARER_ATTRIBUTE = "instant_draft_sharer"
"""On a model runner: its ``HybridDraftRunner``, or None."""


class HybridDraftRunner:
    """Splits one worker's drafting between a plugin and the draft model.

    Args:
        runner: vLLM's ``GPUModelRunner``.
        drafter: the plugin behind its breaker.
        keeper: of the runner's draft model.
        vocab_size: tokens of the target's vocabulary.

    """

    def __init__(
        self, runner: Any, drafter: GuardedPlugin[HybridDrafter], keeper: DraftModelCatchUp, vocab_size: int
    ) -> None:
        self.runner = runner
        self.drafter = drafter
        self.keeper = keeper
        self.vocab_size = vocab_size
        self.draft_steps = 0
        """Of the draft model, after the newest step,"""
        self.uncached_tokens = 0
        """and the tokens that it read before, because they came while it did not run."""

    def propose(self, run_model: Any, scheduler_output: Any, plan: DraftPlan, arguments: tuple[Any, ...]) -> Any:
        """Drafts for the rows of the batch, a list of token ids a row.

        Args:
            run_model: ``propose_draft_token_ids`` as it is without this patch.
            scheduler_output: the step.
            plan: what the scheduler decided about its drafts.
            arguments: of ``propose_draft_token_ids``, behind ``scheduler_output``.

        """
        batch = self.runner.input_batch
        requests = self._requests(scheduler_output, plan, arguments[0]) if any(plan.num_draft_tokens.values()) else []
        # When the plugin is disabled the draft model does everything.
        otherwise = [DraftAssignment(num_draft_tokens=request.max_draft_tokens) for request in requests]
        shares = self.drafter.call("share", lambda drafter: self._ask(drafter, requests, plan), otherwise)
        by_model = {
            request.request_id: share.num_draft_tokens
            for request, share in zip(requests, shares, strict=True)
            if share.num_draft_tokens
        }
        passes = max(by_model.values(), default=0)
        self.draft_steps = passes
        asked = copy.copy(scheduler_output)
        asked.num_spec_tokens_to_schedule = passes
        setattr(asked, PLAN_ATTRIBUTE, replace(plan, num_draft_tokens=by_model))
        drafts: list[list[int]] = run_model(self.runner, asked, *arguments)
        self.uncached_tokens = self.keeper.read_tokens
        rows = batch.req_id_to_index
        if by_model:
            drafted = {request_id: drafts[rows[request_id]] for request_id in by_model}
            self.drafter.call("on_model_drafts", lambda drafter: drafter.on_model_drafts(drafted), None)
        own = {
            rows[request.request_id]: list(share.own)
            for request, share in zip(requests, shares, strict=True)
            # The draft model drafts nothing for a request of which it has not read enough yet.
            if share.own and not drafts[rows[request.request_id]]
        }
        for row, tokens in own.items():
            drafts[row] = tokens
        if self.runner._draft_probs is not None and own:
            self._certain(own)
        return drafts

    def forget(self, request_ids: Iterable[str]) -> None:
        """These requests ended."""
        for request_id in request_ids:
            self.drafter.call("forget", functools.partial(_forget, request_id=request_id), None)

    def _requests(self, scheduler_output: Any, plan: DraftPlan, sampled: Any) -> list[DraftRequest]:
        """The requests that may get drafts, with the tokens of this step."""
        runner, batch = self.runner, self.runner.input_batch
        capacity = batch.token_ids_cpu.shape[1]
        discarded = runner.discard_request_mask.np
        missed = self.keeper.missed(scheduler_output)
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
                    batch.token_ids_cpu[row, :stop],
                    int(batch.num_prompt_tokens[row]),
                    length,
                    plan.cache_salts.get(request_id, ""),
                    request_id in plan.fixed,
                    missed[row],
                )
            )
        return requests

    def _ask(self, drafter: HybridDrafter, requests: Sequence[DraftRequest], plan: DraftPlan) -> list[DraftAssignment]:
        """The plugin's answer with everything checked that could harm the engine further down."""
        if not requests:
            return []
        shares = drafter.assign(requests, plan.draft_cost)
        if len(shares) != len(requests):
            raise ContractError(f"shares for {len(requests)} requests were due, {len(shares)} came")
        checked = []
        for request, share in zip(requests, shares, strict=True):
            if not 0 <= share.num_draft_tokens <= request.max_draft_tokens:
                raise ContractError(f"0 to {request.max_draft_tokens} tokens may be asked for, found {share}")
            own = checked_draft(share.own, request.max_draft_tokens, self.vocab_size)
            checked.append(DraftAssignment(own.token_ids if isinstance(own, Draft) else own, share.num_draft_tokens))
        return checked

    def _certain(self, own: Mapping[int, Sequence[int]]) -> None:
        """Put distributions with all weight on one token where the plugin's tokens are."""
        runner = self.runner
        longest = max(len(tokens) for tokens in own.values())
        probabilities = runner._draft_probs
        missing = longest - probabilities.shape[1]
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


def _build(runner: Any, module: ModuleType) -> HybridDraftRunner | None:
    """The sharer of this runner, if its deployment names a drafter that shares.

    Raises:
        PluginStartError: when the drafter cannot share, or the draft model cannot be skipped.

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
            f"plugin {plugin.name} of slot drafter shares the work with a draft model that can be left out of steps: "
            "it needs synchronous scheduling (--no-async-scheduling), no data, pipeline or context parallelism, and a "
            "draft model of vLLM's method draft_model"
        )
    context = context_of(runner.vllm_config, deployment)
    contained = build_guarded("drafter", deployment, context)
    if contained is None:
        return None
    if not isinstance(contained.instance, HybridDrafter):
        raise PluginStartError(
            f"plugin {plugin.name} of slot drafter cannot start: it brings a draft model, so that its "
            f"{type(contained.instance).__name__} must be a vllm_instant.HybridDrafter"
        )
    return HybridDraftRunner(runner, contained, keeper_of(runner, module), context.vocab_size)


def _wrap(module: ModuleType) -> None:
    runner_class = module.GPUModelRunner
    propose = runner_class.propose_draft_token_ids
    initialize = runner_class.initialize_kv_cache
    update = runner_class._update_states

    @functools.wraps(initialize)
    def initialize_kv_cache(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = initialize(self, *args, **kwargs)
        # The draft model is loaded and its KV cache laid out, and no request is there yet.
        setattr(self, SHARER_ATTRIBUTE, _build(self, module))
        return result

    @functools.wraps(propose)
    def propose_draft_token_ids(self: Any, scheduler_output: Any, *arguments: Any) -> Any:
        sharer = getattr(self, SHARER_ATTRIBUTE, None)
        plan = getattr(scheduler_output, PLAN_ATTRIBUTE, None)
        if sharer is None or plan is None:
            return propose(self, scheduler_output, *arguments)
        return sharer.propose(propose, scheduler_output, plan, arguments)

    @functools.wraps(update)
    def _update_states(self: Any, scheduler_output: Any) -> Any:
        # Not when drafts are due: the step that says that the last request has ended has no tokens, and drafts nothing.
        sharer = getattr(self, SHARER_ATTRIBUTE, None)
        if sharer is not None:
            sharer.forget(scheduler_output.finished_req_ids)
        return update(self, scheduler_output)

    runner_class._update_states = _update_states
    runner_class.initialize_kv_cache = initialize_kv_cache
    runner_class.propose_draft_token_ids = propose_draft_token_ids


def install() -> None:
    """Wrap the model runner when it is loaded."""
    when_imported(MODEL_RUNNER_MODULE, _wrap)


_RUNNER = "v1/worker/gpu_model_runner.py"

PATCH = VllmPatch(
    name="draft sharing",
    purpose="a drafter plugin beside a draft model",
    requirements=(
        HasSignature(
            _RUNNER, "GPUModelRunner.propose_draft_token_ids", ("self", "scheduler_output", "sampled_token_ids")
        ),
        HasSignature(_RUNNER, "GPUModelRunner.initialize_kv_cache", ("self", "kv_cache_config")),
        HasSignature(_RUNNER, "GPUModelRunner._update_states", ("self", "scheduler_output"), exact=True),
        References(_RUNNER, "GPUModelRunner.execute_model", ("_update_states",)),
        References(_RUNNER, "GPUModelRunner._get_spec_decode_draft_probs", ("_draft_probs", "num_draft_tokens")),
        References(_RUNNER, "GPUModelRunner.sample_tokens", ("propose_draft_token_ids", "_bookkeeping_sync")),
        References("v1/worker/gpu_input_batch.py", "InputBatch", ("num_tokens_no_spec", "token_ids_cpu", "req_ids")),
    ),
    slots=("drafter",),
    optional=True,
)
