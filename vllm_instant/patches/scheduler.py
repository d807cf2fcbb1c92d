"""The scheduler: sets the number of draft tokens of each request in each step.

vLLM's scheduler is subclassed, not patched; ``--scheduler-cls`` names ``create_scheduler``. The base class depends on
``async_scheduling``, which the platform decides late, hence a factory: the wrong one of vLLM's two schedulers would
lose the overlap of scheduling and execution (vLLM issue 43724).

Synchronous scheduling: the drafts of a step arrive at its end (``update_draft_token_ids``) and are cut to the numbers
that were planned when the step was scheduled, so that the verified batch becomes smaller. Asynchronous scheduling: the
drafts stay on the device, and the next step carries placeholders, one per planned draft token.
The V2 model runner keeps drafts on the device under synchronous scheduling, too.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from vllm_instant.deployment import deployment_env
from vllm_instant.deployment.circuit_breaker import failure_counts
from vllm_instant.deployment.resolved import installed_plugin
from vllm_instant.interfaces.requests import RequestState
from vllm_instant.interfaces.speculation import StepOutcome
from vllm_instant.patches.admission import BatchingMixin, forbids_drafts
from vllm_instant.patches.client_drafts import ClientDraftsMixin
from vllm_instant.patches.compat import HasAttribute, HasSignature, References, VllmPatch
from vllm_instant.patches.deployment_check import Finding, findings_of, summary_of
from vllm_instant.patches.draft_lengths import UnpaddedLookup, fixed_length_reason
from vllm_instant.patches.moe_reports import count_in
from vllm_instant.patches.names import PLACEHOLDER, PLAN_ATTRIBUTE, REPORT_ATTRIBUTE
from vllm_instant.patches.pinned_prefixes import PinningMixin
from vllm_instant.patches.plugin_factory import build_guarded, context_of, uses_drafter_plugin
from vllm_instant.speculation.draft_budget import DraftBudgetManager
from vllm_instant.speculation.draft_plan import DraftPlan

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput
    from vllm.v1.request import Request


logger = logging.getLogger("vllm.instant")


class InstantMixin(ClientDraftsMixin, BatchingMixin, PinningMixin):
    """Serves ``speculation``, ``batching``, pinned prefixes and drafts of clients; precedes vLLM's scheduler."""

    # Attributes of the vLLM base class that BatchingMixin does not already declare.
    num_spec_tokens: int
    spec_decode_metrics_level: str
    dynamic_sd_lookup: Any

    _asynchronous = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.instant_budget: DraftBudgetManager | None = None
        self.instant_nothing_to_draft = False
        """No request gets drafts after this step, so that there are none to fetch (read by ``patches.engine_core``)."""
        self._latest_output: float | None = None
        self._instant_undraftable: set[str] = set()
        """Live requests beside which no request can have drafts verified."""
        self._instant_plan = DraftPlan()
        self._drafts_on_device = self._asynchronous or bool(self.vllm_config.use_v2_model_runner)
        self._instant_drafter_failures: Sequence[Mapping[str, Any]] = ()
        self._instant_fixed_length = False
        """Whether the drafter drafts ``num_spec_tokens`` in every step; then only verification follows the plan."""
        deployment = deployment_env.get_deployment()
        speculative = self.vllm_config.speculative_config
        self._instant_model_waits = (
            speculative is not None and speculative.method == "draft_model" and not self._drafts_on_device
        )
        """Whether a draft model can be skipped until a first token has left the engine."""
        self._instant_only_model = not (
            deployment is not None
            and speculative is not None
            and uses_drafter_plugin(deployment, speculative)
            and installed_plugin(deployment, "drafter").plugin.build is not None
        )
        self.instant_findings: list[Finding] = []
        if deployment is not None:
            self.instant_findings = findings_of(self.vllm_config, deployment)
            logger.info("This engine: %s", summary_of(self.vllm_config))
            for finding in self.instant_findings:
                logger.info("[%s] %s: %s", finding.slot, finding.verdict, finding.text)
        # Diffusion language models keep their canvas in the place of draft tokens, without a speculative config.
        speculates = speculative is not None and self.num_spec_tokens > 0
        if speculates and self.dynamic_sd_lookup is None:
            self.dynamic_sd_lookup = UnpaddedLookup(self.num_spec_tokens)
        if deployment is not None and speculates:
            context = context_of(self.vllm_config, deployment)
            policy = build_guarded("speculation", deployment, context)
            if policy is not None:
                self.instant_budget = DraftBudgetManager(
                    policy,
                    self.num_spec_tokens,
                    requests=self.instant_requests,
                    graphs=context.full_graphs,
                    adaptive_verification=context.adaptive_verification,
                )
                self._instant_fixed_length = fixed_length_reason(self.vllm_config) is not None
                if self.spec_decode_metrics_level == "none" and os.environ.get(deployment_env.REPORT_DRAFTS):
                    self.spec_decode_metrics_level = "summary"

    def add_request(self, request: Request) -> None:
        """Open the request's state before the base class may schedule it."""
        if self.instant_budget is not None and request.request_id not in self.requests:
            self.instant_budget.admit(self.instant_state(request))
            if not self.vllm_config.use_v2_model_runner and forbids_drafts(request.sampling_params):
                self._instant_undraftable.add(request.request_id)
        super().add_request(request)

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        """Note when the step began, because scheduling is a part of its time."""
        if self.instant_budget is not None:
            self.instant_budget.step_begins()
        if self._instant_undraftable:
            # Drafts of the last step, which would be verified beside such a request's first token.
            for request in self.running:
                request.spec_token_ids = []
        return super().schedule(*args, **kwargs)

    def _update_after_schedule(self, scheduler_output: SchedulerOutput) -> None:
        """Plan the drafts that this step will make, before the base class writes down what it scheduled."""
        budget = self.instant_budget
        if budget is None:
            super()._update_after_schedule(scheduler_output)  # type: ignore[misc]
            return
        # This loop runs for each request in each step: no calls or lookups that it can do without.
        drafting: list[RequestState] = []
        reads_prompts = False
        requests = self.requests
        state_of = budget.states.get
        for request_id, scheduled in scheduler_output.num_scheduled_tokens.items():
            request = requests[request_id]
            # A request that is still reading its prompt after this step samples no token and needs no drafts.
            if request.num_computed_tokens + scheduled < request.num_tokens + request.num_output_placeholders:
                reads_prompts = True
                continue
            state = state_of(request_id)
            if state is not None:
                drafting.append(state)
                if not state.num_output_tokens:
                    reads_prompts = True
        max_wait = 0.0
        if len(self.waiting):
            oldest = self.waiting.peek_request() if self.instant_queue is None else self.instant_queue.oldest()
            max_wait = max(0.0, time.time() - oldest.arrival_time)
        plan = budget.plan_drafts(
            drafting,
            len(self.waiting),
            max_wait,
            hold_model=reads_prompts and self._instant_model_waits,
            only_model=self._instant_only_model,
            no_drafts=bool(self._instant_undraftable),
        )
        # The drafter makes one number for the whole batch: the maximum.
        maximum = max(plan.num_draft_tokens.values(), default=0)
        if not self._instant_fixed_length:
            scheduler_output.num_spec_tokens_to_schedule = maximum
        setattr(scheduler_output, PLAN_ATTRIBUTE, self.instant_with_pushed(plan))
        super()._update_after_schedule(scheduler_output)  # type: ignore[misc]
        if self._asynchronous:
            for request_id, length in plan.num_draft_tokens.items():
                request = requests[request_id]
                if len(request.spec_token_ids) > length:
                    request.spec_token_ids = request.spec_token_ids[:length]
        self._instant_plan = plan
        self.instant_nothing_to_draft = maximum == 0
        budget.step_scheduled(id(scheduler_output))

    def get_grammar_bitmask(self, scheduler_output: SchedulerOutput) -> Any:
        """Let the policies work while the workers execute the step: vLLM calls this right after handing it over."""
        bitmask = super().get_grammar_bitmask(scheduler_output)  # type: ignore[misc]
        if self.instant_budget is not None:
            self.instant_budget.on_model_executing()
        self.instant_background_work()
        return bitmask

    def update_draft_token_ids(self, draft_token_ids: DraftTokenIds) -> None:
        """Cut each request's drafts to its planned length (synchronous scheduling)."""
        if self.instant_budget is not None:
            report = getattr(draft_token_ids, REPORT_ATTRIBUTE, None)
            if report is not None:
                self.instant_budget.on_draft_report(report)
                self._instant_drafter_failures = report.failures
            maximum = self.num_spec_tokens
            planned = self._instant_plan.num_draft_tokens.get
            draft_token_ids.draft_token_ids = [
                row[: planned(request_id, maximum)]
                for request_id, row in zip(draft_token_ids.req_ids, draft_token_ids.draft_token_ids, strict=False)
            ]
        super().update_draft_token_ids(draft_token_ids)  # type: ignore[misc]

    def update_from_output(self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput) -> Any:
        """Observe the accepted drafts before the base class ends requests."""
        budget, batching = self.instant_budget, self.instant_batching
        if budget is not None or (batching is not None and batching.observes):
            self._observe(scheduler_output, model_runner_output)
        outputs = super().update_from_output(scheduler_output, model_runner_output)  # type: ignore[misc]
        if not self.running and not len(self.waiting):
            self._latest_output = None
            if budget is not None:
                budget.engine_idles()
        return outputs

    def _observe(self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput) -> None:
        sampled = model_runner_output.sampled_token_ids
        rows = model_runner_output.req_id_to_index
        drafts_of = scheduler_output.scheduled_spec_decode_tokens
        invalid = scheduler_output.num_invalid_spec_tokens or {}
        state_of = self.instant_requests.states.get
        on_device = self._drafts_on_device
        states: list[RequestState] = []
        drafted: list[int] = []
        accepted: list[int] = []
        for request_id in scheduler_output.num_scheduled_tokens:
            state = state_of(request_id)
            row = rows.get(request_id)
            if state is None or row is None or not sampled or not sampled[row]:
                continue
            produced = len(sampled[row])
            state.num_output_tokens += produced
            drafts = drafts_of.get(request_id)
            count = 0
            if drafts:
                # Placeholders stand for real drafts where these stay on the device, and are padding otherwise.
                count = len(drafts) if on_device else len(drafts) - drafts.count(PLACEHOLDER)
                if invalid:
                    count -= invalid.get(request_id, 0)
            states.append(state)
            drafted.append(count)
            accepted.append(produced - 1 if produced <= count else count)
        if self.instant_budget is not None:
            self.instant_budget.step_finished(
                id(scheduler_output),
                states,
                drafted,
                accepted,
                num_scheduled_tokens=scheduler_output.total_num_scheduled_tokens,
                num_scheduled_requests=len(scheduler_output.num_scheduled_tokens),
                draft_steps=scheduler_output.num_spec_tokens_to_schedule or 0,
                experts=count_in(model_runner_output),
            )
        if self.instant_batching is not None and self.instant_batching.observes:
            now = time.perf_counter()
            if self._latest_output is not None:
                # The time between two outputs of a busy engine; the sum is wall-clock time.
                self.instant_batching.observe(
                    StepOutcome(
                        states,
                        drafted,
                        accepted,
                        scheduler_output.total_num_scheduled_tokens,
                        now - self._latest_output,
                        len(scheduler_output.num_scheduled_tokens),
                    )
                )
            self._latest_output = now

    def _free_request(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        if self.instant_budget is not None:
            self.instant_budget.forget(request.request_id)
        self._instant_undraftable.discard(request.request_id)
        return super()._free_request(request, *args, **kwargs)

    def instant_close(self) -> None:
        """Let the policies save their state (called by ``patches.engine_core``)."""
        for policy in (self.instant_budget, self.instant_batching):
            if policy is not None:
                policy.close()

    def instant_decisions(self, last: int, request_id: str | None = None, queue: bool = False) -> list[dict[str, Any]]:
        """The newest decisions: about draft budgets, or with ``queue`` about the start of requests."""
        decider = self.instant_batching if queue else self.instant_budget
        return decider.decisions(last, request_id) if decider is not None else []

    def instant_totals(self) -> dict[str, Any]:
        """The numbers of this scheduler for the metrics."""
        budget, batching = self.instant_budget, self.instant_batching
        served = [part.policy for part in (budget, batching) if part is not None]
        return {
            "speculation": None if budget is None else budget.totals(),
            "batching": None if batching is None else batching.totals(),
            "findings": [asdict(finding) for finding in self.instant_findings],
            "failures": [*failure_counts(*served), *map(dict, self._instant_drafter_failures)],
        }


def create_scheduler(*args: Any, **kwargs: Any) -> Any:
    """The instant scheduler over the base class that this engine's scheduling mode needs."""
    vllm_config = kwargs["vllm_config"] if "vllm_config" in kwargs else args[0]
    base = _base_of(vllm_config)
    cls = type(
        f"Instant{base.__name__}",
        (InstantMixin, base),
        {"__module__": __name__, "_asynchronous": bool(vllm_config.scheduler_config.async_scheduling)},
    )
    return cls(*args, **kwargs)


def _base_of(vllm_config: Any) -> Any:
    """The scheduler that vLLM would take for this engine."""
    asynchronous = vllm_config.scheduler_config.async_scheduling
    if vllm_config.diffusion_config is not None:
        from vllm.v1.core.sched import diffusion_scheduler

        return diffusion_scheduler.DiffusionAsyncScheduler if asynchronous else diffusion_scheduler.DiffusionScheduler
    if asynchronous:
        from vllm.v1.core.sched.async_scheduler import AsyncScheduler

        return AsyncScheduler
    from vllm.v1.core.sched.scheduler import Scheduler

    return Scheduler


_SCHEDULER = "v1/core/sched/scheduler.py"
_OUTPUT = "v1/core/sched/output.py"

PATCH = VllmPatch(
    name="scheduler",
    purpose="per-request speculation budget",
    requirements=(
        HasSignature(_SCHEDULER, "Scheduler.add_request", ("self", "request"), exact=True),
        HasSignature(_SCHEDULER, "Scheduler._update_after_schedule", ("self", "scheduler_output"), exact=True),
        HasSignature(_SCHEDULER, "Scheduler.update_draft_token_ids", ("self", "draft_token_ids"), exact=True),
        HasSignature(
            _SCHEDULER,
            "Scheduler.update_from_output",
            ("self", "scheduler_output", "model_runner_output"),
            exact=True,
        ),
        HasSignature(_SCHEDULER, "Scheduler._free_request", ("self", "request")),
        HasSignature(_SCHEDULER, "Scheduler.schedule", ("self",)),
        HasSignature(_SCHEDULER, "Scheduler.get_grammar_bitmask", ("self", "scheduler_output"), exact=True),
        References(
            "v1/engine/core.py", "EngineCore.step", ("execute_model", "get_grammar_bitmask", "update_from_output")
        ),
        References(
            _SCHEDULER,
            "Scheduler.__init__",
            ("num_spec_tokens", "requests", "running", "waiting", "spec_decode_metrics_level"),
        ),
        HasSignature("v1/core/sched/request_queue.py", "RequestQueue.peek_request", ("self",)),
        References(_SCHEDULER, "Scheduler.schedule", ("_update_after_schedule", "spec_token_ids")),
        References(_SCHEDULER, "Scheduler.update_draft_token_ids", ("req_ids", "draft_token_ids", "spec_token_ids")),
        HasSignature(
            "v1/core/sched/async_scheduler.py", "AsyncScheduler._update_after_schedule", ("self", "scheduler_output")
        ),
        References(
            "v1/core/sched/async_scheduler.py",
            "AsyncScheduler._update_after_schedule",
            ("spec_token_ids", "num_spec_tokens_to_schedule", "num_output_placeholders"),
        ),
        References("v1/request.py", "Request.__init__", ("cache_salt",)),
        HasAttribute(_OUTPUT, "SchedulerOutput.num_spec_tokens_to_schedule"),
        HasAttribute(_OUTPUT, "SchedulerOutput.scheduled_spec_decode_tokens"),
        HasAttribute(_OUTPUT, "SchedulerOutput.num_scheduled_tokens"),
        HasAttribute(_OUTPUT, "SchedulerOutput.num_invalid_spec_tokens"),
        References(_SCHEDULER, "Scheduler.__init__", ("dynamic_sd_lookup",)),
        References(_SCHEDULER, "Scheduler.schedule", ("dynamic_sd_lookup", "num_spec_tokens")),
        HasAttribute("config/speculative.py", "SpeculativeConfig.parallel_drafting"),
        HasAttribute("config/speculative.py", "SpeculativeConfig.draft_model_config"),
        HasAttribute("config/parallel.py", "ParallelConfig.data_parallel_size"),
        HasAttribute("config/model.py", "ModelConfig.is_moe"),
        HasAttribute("v1/outputs.py", "DraftTokenIds.draft_token_ids"),
        HasAttribute("v1/outputs.py", "ModelRunnerOutput.sampled_token_ids"),
        HasAttribute("v1/outputs.py", "ModelRunnerOutput.req_id_to_index"),
        References("v1/engine/core.py", "EngineCore.post_step", ("take_draft_token_ids", "update_draft_token_ids")),
        HasSignature("config/scheduler.py", "SchedulerConfig.get_scheduler_cls", ("self",)),
        HasAttribute("config/vllm.py", "VllmConfig.diffusion_config"),
        References(
            "config/vllm.py", "VllmConfig.__post_init__", ("diffusion_config", "scheduler_cls", "async_scheduling")
        ),
        HasSignature(
            "v1/core/sched/diffusion_scheduler.py",
            "DiffusionScheduler.update_draft_token_ids",
            ("self", "draft_token_ids"),
        ),
    ),
    slots=("speculation",),
)
