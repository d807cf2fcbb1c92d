"""Drafters that plugins bring, on vLLM's V1 runner, through its ``custom_class`` speculative method.

vLLM builds ``PluginDrafter`` in every worker and asks it for drafts after each step's tokens were sampled. What vLLM
hands to such a class lacks the request ids and the lengths that the scheduler planned; ``GPUModelRunner.
propose_draft_token_ids`` has both, so it is wrapped to lay them beside the drafter first.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from vllm_instant.deployment import deployment_env
from vllm_instant.deployment.circuit_breaker import ContractError, GuardedPlugin
from vllm_instant.deployment.plain import finite, whole_numbers
from vllm_instant.interfaces.drafter import Draft, Drafter, DraftRequest, FollowingDrafter, PushedTail
from vllm_instant.patches.compat import HasAttribute, HasSignature, References, VllmPatch
from vllm_instant.patches.names import MODEL_RUNNER, PLAN_ATTRIBUTE
from vllm_instant.patches.plugin_factory import build_guarded, context_of
from vllm_instant.speculation.draft_plan import DraftPlan, trim_drafts

NO_PLAN = DraftPlan()


class PluginDrafter:
    """What vLLM's ``custom_class`` method instantiates; asks the deployment's drafter plugin."""

    follows = False
    """Whether the plugin is a ``FollowingDrafter``."""

    def __init__(self, vllm_config: Any) -> None:
        deployment = deployment_env.get_deployment()
        if deployment is None:
            raise RuntimeError("PluginDrafter needs a deployment: start the server with --plugins vllm_instant")
        context = context_of(vllm_config, deployment)
        contained = build_guarded("drafter", deployment, context)
        if contained is None:
            raise RuntimeError(f"[drafter] plugin {deployment.slots['drafter'].plugin!r} brings no drafter of its own")
        self.drafter: GuardedPlugin[Drafter] = contained
        self.vocab_size = context.vocab_size
        self.max_draft_tokens = context.num_speculative_tokens
        self._request_ids: Sequence[str] = ()
        self._prompt_lengths: npt.NDArray[np.int32] = np.empty(0, np.int32)
        self._plan = DraftPlan()
        self.follows = isinstance(contained.instance, FollowingDrafter)

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to load: called because vLLM's CPU runner treats every drafter as a model."""

    def begin_step(
        self,
        request_ids: Sequence[str],
        prompt_lengths: npt.NDArray[np.int32],
        plan: DraftPlan,
    ) -> None:
        """Take what vLLM does not pass to ``propose``.

        Args:
            request_ids: by batch index.
            prompt_lengths: int32 ``[batch]`` (or longer), tokens of each prompt.
            plan: what the scheduler decided about drafts.

        """
        self._request_ids = request_ids
        self._prompt_lengths = prompt_lengths
        self._plan = plan

    def enter(self, requests: Iterable[tuple[str, Sequence[int] | None]], plan: DraftPlan) -> None:
        """These requests, with their prompts, are new in a step with this plan.

        The plan lists the requests that sample a token, with their cache salts; others are seen later.
        """
        for request_id, prompt in requests:
            if prompt is not None and request_id in plan.num_draft_tokens:
                tokens = read_only(np.array(prompt, np.int32))
                request = DraftRequest(request_id, tokens, len(tokens), 0, plan.cache_salts.get(request_id, ""))
                self.drafter.call("enter", functools.partial(_enter, request=request), None)

    def forget(self, request_ids: Iterable[str]) -> None:
        """These requests ended."""
        for request_id in request_ids:
            self.drafter.call("forget", functools.partial(_forget, request_id=request_id), None)

    def propose(
        self,
        sampled_token_ids: list[list[int]],
        num_tokens_no_spec: npt.NDArray[np.int32],
        token_ids_cpu: npt.NDArray[np.int32],
        slot_mappings: Any = None,
    ) -> list[list[int]]:
        """Drafts for each row of the batch; an empty list where nothing was sampled or nothing is wanted.

        Args:
            sampled_token_ids: the tokens of this step by batch index, already stored in ``token_ids_cpu``.
            num_tokens_no_spec: int32 ``[max_num_seqs]``, tokens of each request so far.
            token_ids_cpu: int32 ``[max_num_seqs, max_model_len]``.
            slot_mappings: unused.

        """
        drafts: list[list[int]] = [[] for _ in sampled_token_ids]
        wanted: list[DraftRequest] = []
        rows: list[int] = []
        capacity = token_ids_cpu.shape[1]
        tokens_of_all = read_only(token_ids_cpu)
        plan, follows = self._plan, self.follows
        for row, sampled in enumerate(sampled_token_ids):
            request_id = self._request_ids[row]
            num_tokens = int(num_tokens_no_spec[row])
            length = min(plan.num_draft_tokens.get(request_id, self.max_draft_tokens), capacity - num_tokens)
            if sampled and (length > 0 or follows):
                wanted.append(
                    DraftRequest(
                        request_id,
                        tokens_of_all[row, :num_tokens],
                        int(self._prompt_lengths[row]),
                        max(length, 0),
                        plan.cache_salts.get(request_id, ""),
                        request_id in plan.fixed,
                    )
                )
                rows.append(row)
        if plan.pushed and follows:
            self.drafter.call("receive", functools.partial(_receive, pushed=plan.pushed), None)
        if wanted:
            nothing: list[Sequence[int]] = [[] for _ in wanted]
            proposed = self.drafter.call("propose", lambda drafter: self._ask(drafter, wanted), nothing)
            for row, tokens_of_row in zip(rows, proposed, strict=True):
                drafts[row] = list(tokens_of_row)
        return drafts

    def _ask(self, drafter: Drafter, wanted: list[DraftRequest]) -> list[Sequence[int]]:
        """The drafter's answer with everything checked that could harm the engine further down, and cut by price."""
        answer = drafter.propose(tuple(wanted))
        if len(answer) != len(wanted):
            raise ContractError(f"drafts for {len(wanted)} requests were due, {len(answer)} came")
        checked = [
            checked_draft(proposal, request.max_draft_tokens, self.vocab_size)
            for request, proposal in zip(wanted, answer, strict=True)
        ]
        return trim_drafts(checked, self._plan.draft_cost, [request.is_fixed for request in wanted])


def read_only(array: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
    """A view of an array into which nothing can be written: vLLM's own buffer must not change with it."""
    view = array.view()
    view.flags.writeable = False
    return view


def checked_draft(proposal: Sequence[int] | Draft | None, most: int, vocab_size: int) -> list[int] | Draft:
    """A plugin's draft as plain integers.

    Raises:
        ContractError: when it is too long, or holds what is no token, or not one confidence a token.

    """
    tokens = proposal.token_ids if isinstance(proposal, Draft) else proposal
    if tokens is None or len(tokens) > most:
        raise ContractError(f"0 to {most} draft tokens were due, found {'None' if tokens is None else len(tokens)}")
    plain = whole_numbers(tokens, "token ids")
    if plain and not (0 <= min(plain) and max(plain) < vocab_size):
        # Which ones is not said: they are text of a user, and this goes to the log.
        outside = sum(not 0 <= token < vocab_size for token in plain)
        raise ContractError(f"token ids must lie in 0..{vocab_size - 1}, found {outside} others")
    if not isinstance(proposal, Draft):
        return plain
    if len(proposal.confidence) != len(plain):
        raise ContractError(f"{len(plain)} confidences were due, {len(proposal.confidence)} came")
    return Draft(plain, [min(1.0, max(0.0, finite(value, "a confidence"))) for value in proposal.confidence])


def _forget(drafter: Drafter, request_id: str) -> None:
    drafter.forget(request_id)


def _enter(drafter: Any, request: DraftRequest) -> None:
    drafter.enter(request)


def _receive(drafter: Any, pushed: Mapping[str, Sequence[PushedTail]]) -> None:
    drafter.receive(pushed)


def _propose(propose: Any, runner: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
    """Lay what vLLM does not pass on beside the drafter, then let vLLM ask it."""
    if isinstance(runner.drafter, PluginDrafter):
        batch = runner.input_batch
        plan = getattr(scheduler_output, PLAN_ATTRIBUTE, NO_PLAN)
        runner.drafter.begin_step(batch.req_ids, batch.num_prompt_tokens, plan)
    return propose(scheduler_output, *args, **kwargs)


def _update_states(update: Any, runner: Any, scheduler_output: Any) -> Any:
    """Forget finished requests here and not while drafting: an engine's last step has no tokens and drafts nothing."""
    drafter = getattr(runner, "drafter", None)
    if isinstance(drafter, PluginDrafter):
        # Sorted, because the order of a set differs between processes and the ranks must do the same.
        drafter.forget(sorted(scheduler_output.finished_req_ids))
        if drafter.follows:
            new = ((request.req_id, request.prompt_token_ids) for request in scheduler_output.scheduled_new_reqs)
            drafter.enter(new, getattr(scheduler_output, PLAN_ATTRIBUTE, NO_PLAN))
    return update(scheduler_output)


_RUNNER = "v1/worker/gpu_model_runner.py"

PATCH = VllmPatch(
    name="drafter",
    purpose="drafters that plugins bring",
    requirements=(
        HasSignature(
            _RUNNER, "GPUModelRunner.propose_draft_token_ids", ("self", "scheduler_output", "sampled_token_ids")
        ),
        HasSignature(_RUNNER, "GPUModelRunner._update_states", ("self", "scheduler_output"), exact=True),
        References(_RUNNER, "GPUModelRunner.execute_model", ("_update_states",)),
        References(
            _RUNNER,
            "GPUModelRunner.propose_draft_token_ids",
            ("drafter", "propose", "num_tokens_no_spec", "token_ids_cpu"),
        ),
        References("v1/worker/gpu_input_batch.py", "InputBatch", ("num_prompt_tokens", "req_ids")),
        HasAttribute("v1/core/sched/output.py", "SchedulerOutput.scheduled_new_reqs"),
        HasAttribute("v1/core/sched/output.py", "NewRequestData.prompt_token_ids"),
        HasSignature("v1/spec_decode/custom_class_proposer.py", "create_custom_proposer", ("vllm_config",)),
    ),
    slots=("drafter",),
    wraps={
        f"{MODEL_RUNNER}:GPUModelRunner.propose_draft_token_ids": _propose,
        f"{MODEL_RUNNER}:GPUModelRunner._update_states": _update_states,
    },
)
