"""Drafter plugins on vLLM's V2 model runner, under asynchronous scheduling.

The V2 runner has no method for drafters of others, and vLLM schedules asynchronously only with methods that it knows.
So a deployment whose drafter can draft on the device is configured with method ``ngram_gpu`` and the model name of
``PluginDrafter``, and ``init_speculator`` gives the runner ``PluginSpeculator`` in the place of vLLM's n-gram lookup.
With that method vLLM keeps all tokens of all requests on the device, where its own lookup and ours read them.

How many tokens are verified is decided when a step is scheduled, before its drafts exist: a lookup that finds nothing
is verified all the same, and ``goodput`` learns by acceptance how many are worth it.
"""

from __future__ import annotations

import functools
from typing import Any

from vllm_instant.deployment import deployment_env
from vllm_instant.deployment.circuit_breaker import ContractError, GuardedPlugin
from vllm_instant.deployment.errors import DeploymentError, Problem
from vllm_instant.deployment.resolved import PLUGIN_DRAFTER, drafter_arguments, installed_plugin
from vllm_instant.interfaces.deployment import Deployment
from vllm_instant.interfaces.drafter import DeviceDraftBatch, DeviceDrafter, DeviceRequest, HybridDeviceDrafter
from vllm_instant.patches.compat import HasAttribute, HasSignature, References, VllmPatch
from vllm_instant.patches.draft_lengths import DEVICE_METHOD, drafts_on_device
from vllm_instant.patches.names import ENGINE_ARGUMENTS, MODEL_RUNNER, PLAN_ATTRIBUTE, V2_MODEL_RUNNER
from vllm_instant.patches.plugin_factory import PluginStartError, build_guarded, context_of, uses_drafter_plugin
from vllm_instant.patches.rejection_sampler import V2_SAMPLERS
from vllm_instant.speculation.draft_plan import DraftPlan

OWN_ATTRIBUTE = "instant_own_drafts"
"""Attribute of vLLM's speculator with the ``PluginSpeculator`` beside it."""


class PluginSpeculator:
    """What the V2 model runner asks for drafts; it has the attributes of vLLM's ``BaseSpeculator``.

    Args:
        drafter: the plugin behind its breaker.
        request_state: vLLM's ``RequestState``, the tokens of all requests by row.
        max_draft_tokens: ``num_speculative_tokens``.
        vocab_size: tokens of the model's vocabulary.
        device: of the tensors.

    """

    num_query_per_req = 1
    num_extra_query_per_req = 0
    supports_mm_inputs = False
    draft_logits = None
    """Without the distributions of the drafts vLLM verifies them as deterministic ones, as they are."""
    pcp_manager: Any = None

    def __init__(
        self,
        drafter: GuardedPlugin[DeviceDrafter],
        request_state: Any,
        max_draft_tokens: int,
        vocab_size: int,
        device: Any,
    ) -> None:
        import torch

        self.drafter = drafter
        self.request_state = request_state
        self.vocab_size = vocab_size
        self.drafts = torch.zeros((request_state.max_num_reqs, max_draft_tokens), dtype=torch.int64, device=device)
        self._plan = DraftPlan()

    def init_cudagraph_manager(self, cudagraph_mode: Any) -> None:
        """Nothing to record: the drafter runs between the graphs of two steps."""

    def capture(self) -> None:
        """Nothing to record."""

    def begin_step(self, plan: DraftPlan) -> None:
        """Take what vLLM does not pass to ``propose``."""
        self._plan = plan

    def forget(self, request_id: str) -> None:
        """A request ended; its row is still in place."""
        state = self.request_state
        row = state.req_id_to_index.get(request_id)
        if row is None:
            return
        num_prompt_tokens = int(state.prompt_len.np[row])
        # A step in flight may have added 1 + num_speculative_tokens to what the host counts.
        bound = int(state.num_computed_tokens_np[row]) + 2 * (1 + self.drafts.shape[1])
        request = DeviceRequest(
            request_id,
            row,
            num_prompt_tokens,
            min(bound, state.max_model_len),
            state.all_token_ids.gpu,
            state.total_len.gpu,
        )
        self.drafter.call("forget_on_device", functools.partial(_forget, request=request), None)

    def propose(
        self,
        input_batch: Any,
        attn_metadata: Any,
        slot_mappings: Any,
        last_hidden_states: Any,
        aux_hidden_states: Any,
        num_sampled: Any,
        num_rejected: Any,
        last_sampled: Any,
        next_prefill_tokens: Any,
        temperature: Any,
        seeds: Any,
        *,
        dummy_run: bool = False,
        num_speculative_tokens: int | None = None,
        **unused: Any,
    ) -> Any:
        """Draft tokens, int64 ``[num_reqs, max_draft_tokens]``; arguments as of vLLM's ``BaseSpeculator.propose``."""
        drafts = self.drafts[: input_batch.num_reqs]
        batch = self.batch_of(input_batch, num_sampled, num_rejected, num_speculative_tokens, dummy_run)
        if batch is None:
            return drafts
        answer = self.ask(batch)
        # vLLM writes -1 behind the planned tokens of earlier steps, which must not reach the model.
        return drafts.zero_() if answer is None else answer

    def batch_of(
        self, input_batch: Any, num_sampled: Any, num_rejected: Any, num_speculative_tokens: int | None, dummy_run: bool
    ) -> DeviceDraftBatch | None:
        """What the plugin gets of a step; None where nothing is drafted."""
        most = self.drafts.shape[1]
        planned = most if num_speculative_tokens is None else num_speculative_tokens
        if dummy_run or planned == 0:
            return None
        state = self.request_state
        upper_bound = int((input_batch.num_computed_tokens_np + input_batch.num_scheduled_tokens).max()) + 1
        return DeviceDraftBatch(
            input_batch.req_ids,
            self._plan.cache_salts,
            planned,
            state.all_token_ids.gpu,
            state.total_len.gpu,
            input_batch.idx_mapping,
            num_sampled,
            min(upper_bound, state.max_model_len),
            num_rejected,
        )

    def ask(self, batch: DeviceDraftBatch) -> Any:
        """The plugin's drafts, int64 ``[num_reqs, max_draft_tokens]``; None after a failure."""
        return self.drafter.call("propose_on_device", functools.partial(self._ask, batch=batch), None)

    def _ask(self, drafter: DeviceDrafter, batch: DeviceDraftBatch) -> Any:
        """The drafter's answer, in a tensor of our own in which every entry is a token of the vocabulary."""
        answer = drafter.propose_on_device(batch)
        drafts = self.drafts[: len(batch.request_ids)]
        if tuple(answer.shape) != tuple(drafts.shape) or answer.dtype != drafts.dtype:
            raise ContractError(
                f"int64 drafts of shape {list(drafts.shape)} were due, found {answer.dtype} {list(answer.shape)}"
            )
        return drafts.copy_(answer).clamp_(0, self.vocab_size - 1)


def own_drafts(speculator: Any) -> PluginSpeculator | None:
    """The plugin's part of the V2 runner's speculator; None where it has none."""
    found = speculator if isinstance(speculator, PluginSpeculator) else getattr(speculator, OWN_ATTRIBUTE, None)
    return found if isinstance(found, PluginSpeculator) else None


def brings_draft_model(deployment: Deployment, speculative_config: Any) -> bool:
    """Whether the server drafts with a plugin that drafts on the device beside a draft model of vLLM."""
    return (
        speculative_config is not None
        and is_hybrid_on_device(deployment)
        and uses_drafter_plugin(deployment, speculative_config)
    )


def is_hybrid_on_device(deployment: Deployment) -> bool:
    """Whether the deployment's drafter drafts on the device and brings a draft model."""
    plugin = installed_plugin(deployment, "drafter").plugin
    return plugin.build_on_device is not None and plugin.engine_arguments is not None


def _forget(drafter: DeviceDrafter, request: DeviceRequest) -> None:
    drafter.forget_on_device(request)


def unsupported_reason(arguments: Any) -> str | None:
    """Why a drafter plugin cannot draft on the device with these ``EngineArgs``; None if it can."""
    import vllm.envs as envs
    from vllm.triton_utils import HAS_TRITON

    deployment = deployment_env.get_deployment()
    if deployment is None or installed_plugin(deployment, "drafter").plugin.build_on_device is None:
        return "the drafter has no build_on_device"
    if not HAS_TRITON:
        return "Triton is not usable here"
    if envs.VLLM_USE_V2_MODEL_RUNNER is False:
        return "VLLM_USE_V2_MODEL_RUNNER=0 is set"
    if envs.VLLM_USE_V2_MODEL_RUNNER is None and _other_slot_needs_v1(deployment):
        return "a plugin of another slot needs the V1 model runner"
    if arguments.enable_dbo or arguments.distributed_executor_backend == "external_launcher":
        return "the V2 model runner does not support these parallel options"
    return None


def _other_slot_needs_v1(deployment: Deployment) -> bool:
    """Whether a sampler or an experts plugin was chosen that only the V1 model runner has."""
    slots = deployment.slots
    return slots["rejection_sampler"].plugin not in V2_SAMPLERS or slots["experts"].plugin != "native"


def _create_speculative_config(create: Any, arguments: Any, *args: Any, **kwargs: Any) -> Any:
    """Let a drafter plugin draft on the device where vLLM can serve with its V2 model runner."""
    config = arguments.speculative_config
    if isinstance(config, dict) and config.get("method") == "custom_class" and config.get("model") == PLUGIN_DRAFTER:
        _refuse_host_drafter()
        if unsupported_reason(arguments) is None:
            bounds = {"prompt_lookup_min": 1, "prompt_lookup_max": 1}
            arguments.speculative_config = {**config, "method": DEVICE_METHOD, **bounds}
    elif _is_hybrid_on_host(arguments) and arguments.async_scheduling is None:
        # The host needs each step's tokens before the next step begins. Left open, vLLM would schedule ahead.
        arguments.async_scheduling = False
    return create(*args, **kwargs)


def _is_hybrid_on_host(arguments: Any) -> bool:
    """Whether parsed options configure a draft model beside which a drafter plugin drafts on the host."""
    deployment, config = deployment_env.get_deployment(), arguments.speculative_config
    if deployment is None or not isinstance(config, dict):
        return False
    plugin = installed_plugin(deployment, "drafter").plugin
    brings_model = plugin.build is not None and plugin.engine_arguments is not None
    method = drafter_arguments(deployment).get("speculative_config", {}).get("method")
    return brings_model and config.get("method") == method and unsupported_reason(arguments) is not None


def _refuse_host_drafter() -> None:
    """Refuse ``VLLM_USE_V2_MODEL_RUNNER=1`` for a drafter that drafts on the host only, in one sentence."""
    import vllm.envs as envs

    deployment = deployment_env.get_deployment()
    if deployment is None or not envs.VLLM_USE_V2_MODEL_RUNNER:
        return
    plugin = installed_plugin(deployment, "drafter").plugin
    if plugin.build is not None and plugin.build_on_device is None:
        source = deployment.origins.get("drafter.plugin", deployment.file or "deployment")
        sentence = f"{plugin.name} needs the V1 model runner: set VLLM_USE_V2_MODEL_RUNNER=0"
        raise DeploymentError([Problem(source, "[drafter]", sentence)])


def _init_speculator(initialize: Any, vllm_config: Any, device: Any, request_state: Any) -> Any:
    deployment, speculative = deployment_env.get_deployment(), vllm_config.speculative_config
    alone = drafts_on_device(speculative)
    if deployment is None or not (alone or brings_draft_model(deployment, speculative)):
        return initialize(vllm_config, device, request_state)
    context = context_of(vllm_config, deployment)
    drafter = build_guarded("drafter", deployment, context, on_device=True)
    if drafter is None:
        raise PluginStartError("the plugin of slot drafter has no build_on_device, which the V2 model runner needs")
    own = PluginSpeculator(drafter, request_state, context.num_speculative_tokens, context.vocab_size, device)
    if alone:
        return own
    if not isinstance(drafter.instance, HybridDeviceDrafter):
        raise PluginStartError(
            f"plugin {drafter.plugin} of slot drafter cannot start: it brings a draft model, so that its "
            f"{type(drafter.instance).__name__} must be a vllm_instant.interfaces.drafter.HybridDeviceDrafter"
        )
    speculator = initialize(vllm_config, device, request_state)
    setattr(speculator, OWN_ATTRIBUTE, own)
    return speculator


def _init_v1_runner(initialize: Any, runner: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
    """Refuse the V1 model runner, which would draft with vLLM's own n-gram lookup."""
    if drafts_on_device(vllm_config.speculative_config):
        raise PluginStartError(
            "the plugin of slot drafter was to draft on the device, but vLLM chose its V1 model runner for another "
            "option: set VLLM_USE_V2_MODEL_RUNNER=0 to draft on the host, or 1 to learn which option it is"
        )
    initialize(vllm_config, *args, **kwargs)


def _finish_requests(finish: Any, runner: Any, scheduler_output: Any) -> Any:
    """Every step begins with this; ended requests still have their rows."""
    speculator = own_drafts(runner.speculator)
    if speculator is not None:
        speculator.begin_step(getattr(scheduler_output, PLAN_ATTRIBUTE, None) or DraftPlan())
        # Sorted, because the order of a set differs between processes and the ranks must do the same.
        for request_id in sorted(scheduler_output.finished_req_ids):
            speculator.forget(request_id)
    return finish(scheduler_output)


_RUNNER = "v1/worker/gpu/model_runner.py"
_STATES = "v1/worker/gpu/states.py"

PATCH = VllmPatch(
    name="v2_drafter",
    purpose="drafters that plugins bring, on the V2 model runner",
    requirements=(
        HasSignature(
            "v1/worker/gpu/spec_decode/__init__.py", "init_speculator", ("vllm_config", "device", "req_states"), True
        ),
        References(_RUNNER, "GPUModelRunner.__init__", ("init_speculator", "use_ngram", "use_dense_all_token_ids")),
        HasSignature(_RUNNER, "GPUModelRunner.finish_requests", ("self", "scheduler_output"), exact=True),
        References(_RUNNER, "GPUModelRunner.execute_model", ("finish_requests", "add_requests")),
        References(
            _RUNNER,
            "GPUModelRunner.sample_tokens",
            ("postprocess_sampled", "propose", "draft_tokens", "num_spec_tokens"),
        ),
        HasSignature(
            "v1/worker/gpu/spec_decode/speculator.py",
            "BaseSpeculator.propose",
            (
                "self",
                "input_batch",
                "attn_metadata",
                "slot_mappings",
                "last_hidden_states",
                "aux_hidden_states",
                "num_sampled",
                "num_rejected",
                "last_sampled",
                "next_prefill_tokens",
                "temperature",
                "seeds",
            ),
        ),
        References(
            "v1/worker/gpu/spec_decode/ngram/speculator.py",
            "NgramGPUSpeculator.propose",
            ("all_token_ids", "total_len", "idx_mapping", "num_sampled"),
        ),
        References(
            _STATES,
            "RequestState.__init__",
            ("all_token_ids", "total_len", "prompt_len", "num_computed_tokens_np", "req_id_to_index", "max_model_len"),
        ),
        HasAttribute("v1/worker/gpu/input_batch.py", "InputBatch.num_computed_tokens_np"),
        HasAttribute("v1/worker/gpu/input_batch.py", "InputBatch.num_scheduled_tokens"),
        HasAttribute("config/speculative.py", "NgramGPUTypes"),
        References("config/vllm.py", "VllmConfig.__post_init__", ("NgramGPUTypes",)),
        HasSignature("engine/arg_utils.py", "EngineArgs.create_speculative_config", ("self", "target_model_config")),
        HasSignature("v1/worker/gpu_model_runner.py", "GPUModelRunner.__init__", ("self", "vllm_config")),
        HasAttribute("engine/arg_utils.py", "EngineArgs.async_scheduling"),
        HasAttribute("engine/arg_utils.py", "EngineArgs.enable_dbo"),
        HasAttribute("engine/arg_utils.py", "EngineArgs.distributed_executor_backend"),
    ),
    slots=("drafter",),
    optional=True,
    wraps={
        f"{ENGINE_ARGUMENTS}:EngineArgs.create_speculative_config": _create_speculative_config,
        f"{V2_MODEL_RUNNER}:init_speculator": _init_speculator,
        f"{V2_MODEL_RUNNER}:GPUModelRunner.finish_requests": _finish_requests,
        f"{MODEL_RUNNER}:GPUModelRunner.__init__": _init_v1_runner,
    },
)
