"""Experts plugins: which routed experts the tokens of a step may use.

Routers are changed where vLLM makes them, so that it chooses kernels that take the router's word, and begin to ask the
plugin when the target model is loaded: those of a draft model never do. Around the model runner's forward pass the rows
of the step are named, and where the plugin asks for it the step runs once before for comparison. Its keys and values go
where those of the pass that counts then overwrite them, so that what is kept belongs to the answers.
"""

from __future__ import annotations

import functools
import logging
from types import ModuleType
from typing import Any

import numpy as np

from vllm_instant.deployment import deployment_env
from vllm_instant.deployment.slots import SLOTS
from vllm_instant.interfaces.deployment import Deployment
from vllm_instant.interfaces.experts import ExpertLayer, StepRows
from vllm_instant.patches import moe_routers
from vllm_instant.patches.compat import HasAttribute, HasSignature, References, VllmPatch
from vllm_instant.patches.import_hooks import when_imported
from vllm_instant.patches.moe_worker import MoeWorker
from vllm_instant.patches.plugin_factory import PluginStartError, build_guarded, context_of

logger = logging.getLogger("vllm.instant")

LAYER_MODULE = "vllm.model_executor.layers.fused_moe.layer"
MODEL_RUNNER_MODULE = "vllm.v1.worker.gpu_model_runner"
CPU_RUNNER_MODULE = "vllm.v1.worker.cpu_model_runner"
V2_RUNNER_MODULE = "vllm.v1.worker.gpu.model_runner"
SERVING = "instant_experts"
"""On a model runner: its ``MoeWorker``. On its output: the report."""
CLASS_KEY = "instant_prompt_class"
"""What a client writes into ``vllm_xargs`` to name its kind of prompt in traces."""
CACHE_KEY = "vllm_instant_experts"
"""In ``additional_config``: makes compiled graphs with our operator others than those without it."""


def chosen() -> Deployment | None:
    """The deployment, if it names an experts plugin."""
    deployment = deployment_env.get_deployment()
    # By the name alone: in a worker it is too early to load plugins (see activation.activate).
    if deployment is None or deployment.slots["experts"].plugin == SLOTS["experts"].default:
        return None
    return deployment


def objection_to(vllm_config: Any) -> str | None:
    """Why an engine cannot serve experts plugins; None if it can."""
    parallel = vllm_config.parallel_config
    if parallel.pipeline_parallel_size > 1:
        return f"each worker must hold all layers; found pipeline_parallel_size = {parallel.pipeline_parallel_size}"
    if parallel.data_parallel_size > 1:
        return f"each worker must see all tokens of a step; found data_parallel_size = {parallel.data_parallel_size}"
    if getattr(parallel, "prefill_context_parallel_size", 1) > 1:
        return "each worker must see all tokens of a step; found prefill context parallelism"
    if parallel.enable_dbo:
        return "steps must not be split into microbatches; found enable_dbo"
    return None


def served_layers(model: Any, name: str) -> list[tuple[Any, ExpertLayer, Any]]:
    """The routers of a model's MoE layers with what plugins may know of them.

    Raises:
        PluginStartError: when there are none, or one that cannot be served.

    """
    from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

    found: list[tuple[Any, ExpertLayer, Any]] = []
    for runner in (module for module in model.modules() if isinstance(module, MoERunner)):
        router = runner.router
        moe_routers.adopt(router)
        if runner.moe_config.is_sequence_parallel:
            raise PluginStartError(
                f"plugin {name} of slot experts cannot serve {runner.layer_name}: its tokens are split between workers "
                "(sequence parallelism)"
            )
        if runner.is_monolithic:
            raise PluginStartError(
                f"plugin {name} of slot experts cannot serve {runner.layer_name}: its kernel "
                f"({type(runner._quant_method).__name__}) routes by itself; choose another with --moe-backend, for "
                "example triton"
            )
        try:
            scoring = moe_routers.scoring_of(router)
        except moe_routers.UnservedRouterError as error:
            raise PluginStartError(f"plugin {name} of slot experts cannot serve {runner.layer_name}: {error}") from None
        # With redundant replicas (EPLB) there are more physical experts; the router speaks of logical ones.
        experts = runner.moe_config.num_logical_experts or router.global_num_experts
        layer = ExpertLayer(len(found), runner.layer_name, experts, router.top_k, scoring.function, scoring.renormalize)
        found.append((router, layer, scoring))
    if not found:
        raise PluginStartError(
            f"plugin {name} of slot experts has nothing to do: this model has no mixture-of-experts layers that vLLM "
            "routes; remove the [experts] table"
        )
    return found


def _attach(runner: Any) -> None:
    """Serve the layers of a model that was just loaded."""
    deployment = chosen()
    if deployment is None or getattr(runner, SERVING, None) is not None:
        return
    name = deployment.slots["experts"].plugin
    layers = served_layers(runner.get_model(), name)
    plugin = build_guarded("experts", deployment, context_of(runner.vllm_config, deployment))
    if plugin is None:
        return
    serving = MoeWorker(plugin, len(runner.is_padding), runner.device)
    try:
        serving.serve(layers)
    except ValueError as error:
        raise PluginStartError(f"plugin {name} of slot experts cannot start: {error}") from error
    setattr(runner, SERVING, serving)


def _attaching(load: Any) -> Any:
    @functools.wraps(load)
    def load_model(self: Any, *args: Any, **kwargs: Any) -> Any:
        loaded = load(self, *args, **kwargs)
        _attach(self)
        return loaded

    return load_model


def objection_to_shadow(runner: Any) -> str | None:
    """Why a step cannot run twice on this runner; None if it can."""
    from vllm.distributed.kv_transfer import has_kv_transfer_group
    from vllm.v1.kv_cache_interface import AttentionSpec

    if any(not isinstance(group.kv_cache_spec, AttentionSpec) for group in runner.kv_cache_config.kv_cache_groups):
        return "the model keeps a state that each pass moves on"
    if has_kv_transfer_group():
        return "KV blocks are sent to another engine as they are written"
    return None


def rows_of(runner: Any, scheduler_output: Any, scheduled: Any, number: int) -> tuple[StepRows, list[int]]:
    """Who the rows of a step belong to, and the number of draft tokens of each request."""
    batch = runner.input_batch
    requests = len(scheduled)
    ids = batch.req_ids[:requests]
    drafts_of = scheduler_output.scheduled_spec_decode_tokens
    drafts = [len(drafts_of.get(request_id, ())) for request_id in ids]
    computed = batch.num_computed_tokens_cpu[:requests].astype(np.int64)
    # One new token, and the drafts behind it; what a preempted request reads again is not an answer.
    is_decode = (computed >= batch.num_prompt_tokens[:requests]) & (scheduled <= 1 + np.array(drafts, np.int64))
    classes = [_told_class(runner.requests[request_id]) for request_id in ids]
    starts = np.concatenate([[0], np.cumsum(scheduled, dtype=np.int64)])
    return StepRows(number, ids, starts, is_decode, classes, computed), drafts


def _told_class(request: Any) -> str:
    extra = getattr(request.sampling_params, "extra_args", None)
    return str(extra[CLASS_KEY]) if extra and CLASS_KEY in extra else ""


def _wrap(module: ModuleType) -> None:
    runner_class = module.GPUModelRunner
    initialize, prepare = runner_class.__init__, runner_class._prepare_inputs
    forward, sample, cache = runner_class._model_forward, runner_class.sample_tokens, runner_class.initialize_kv_cache

    @functools.wraps(initialize)
    def __init__(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807  the name is vLLM's
        deployment = chosen()
        if deployment is not None:
            name = deployment.slots["experts"].plugin
            unsupported_reason = objection_to(vllm_config)
            if unsupported_reason is not None:
                raise PluginStartError(f"plugin {name} of slot experts cannot serve: {unsupported_reason}")
            additional = vllm_config.additional_config
            if isinstance(additional, dict):
                vllm_config.additional_config = {**additional, CACHE_KEY: "route"}
        initialize(self, vllm_config, *args, **kwargs)

    @functools.wraps(cache)
    def initialize_kv_cache(self: Any, *args: Any, **kwargs: Any) -> Any:
        initialized = cache(self, *args, **kwargs)
        serving = getattr(self, SERVING, None)
        if serving is not None:
            serving.shadow_objection = objection_to_shadow(self)
        return initialized

    @functools.wraps(prepare)
    def _prepare_inputs(self: Any, scheduler_output: Any, num_scheduled_tokens: Any) -> Any:
        prepared = prepare(self, scheduler_output, num_scheduled_tokens)
        serving = getattr(self, SERVING, None)
        if serving is not None:
            serving.begin(*rows_of(self, scheduler_output, num_scheduled_tokens, serving.number + 1))
            # Which rows will be sampled from; on the host they would cost nothing, but vLLM makes them on the device.
            self.instant_sampled_rows = prepared[0] if serving.wants_shadow else None
        return prepared

    @functools.wraps(forward)
    def _model_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        serving = getattr(self, SERVING, None)
        if serving is None:
            return forward(self, *args, **kwargs)
        rows = None
        if serving.wants_shadow:
            rows = serving.compared_rows(self.instant_sampled_rows)
        if rows is not None and len(rows):
            shadow = _shadow(self, serving, rows, lambda: forward(self, *args, **kwargs))
            serving.before_forward()
            output = forward(self, *args, **kwargs)
            _compare(self, serving, shadow, _hidden(output)[rows])
        else:
            serving.before_forward()
            output = forward(self, *args, **kwargs)
        serving.finish()
        return output

    @functools.wraps(sample)
    def sample_tokens(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = sample(self, *args, **kwargs)
        serving = getattr(self, SERVING, None)
        if serving is not None and output is not None:
            report = serving.report()
            if report is not None:
                # Under asynchronous scheduling the output that is sent is inside of the one that is returned.
                setattr(getattr(output, "_model_runner_output", output), SERVING, report)
        return output

    runner_class.__init__ = __init__
    runner_class.initialize_kv_cache = initialize_kv_cache
    runner_class._prepare_inputs = _prepare_inputs
    runner_class._model_forward = _model_forward
    runner_class.sample_tokens = sample_tokens
    runner_class.load_model = _attaching(runner_class.load_model)


def _hidden(output: Any) -> Any:
    return output[0] if isinstance(output, tuple) else output


def _shadow(runner: Any, serving: MoeWorker, rows: Any, run: Any) -> Any:
    """The hidden states of some rows as the pass for comparison has them."""
    from vllm.forward_context import get_forward_context

    serving.reference_pass(True)
    try:
        # A graph that is replayed writes its next output to the same place; indexing copies.
        return _hidden(run())[rows]
    finally:
        serving.reference_pass(False)
        # MoE layers find themselves by counting the calls within one forward context.
        get_forward_context().moe_layer_index = 0


def _compare(runner: Any, serving: MoeWorker, shadow: Any, served: Any) -> None:
    from vllm.distributed import get_tp_group

    model = runner.get_model()
    shadow_logits, served_logits = model.compute_logits(shadow), model.compute_logits(served)
    group = get_tp_group()
    # Only the first worker may have all logits, and all must come to the same decisions.
    nothing = served_logits is None
    sums = serving.nothing_compared() if nothing else serving.compare(shadow_logits, served_logits)
    serving.add_comparison(group.broadcast(sums, src=0) if group.world_size > 1 else sums)


def _wrap_cpu(module: ModuleType) -> None:
    module.CPUModelRunner.load_model = _attaching(module.CPUModelRunner.load_model)


def _wrap_v2(module: ModuleType) -> None:
    initialize = module.GPUModelRunner.__init__

    @functools.wraps(initialize)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        deployment = chosen()
        if deployment is not None:
            raise PluginStartError(
                f"plugin {deployment.slots['experts'].plugin} of slot experts needs vLLM's V1 model runner: set "
                "VLLM_USE_V2_MODEL_RUNNER=0"
            )
        initialize(self, *args, **kwargs)

    module.GPUModelRunner.__init__ = __init__


def _wrap_factory(module: Any) -> None:
    create = module.create_fused_moe_router

    @functools.wraps(create)
    def create_fused_moe_router(*args: Any, **kwargs: Any) -> Any:
        router = create(*args, **kwargs)
        moe_routers.adopt(router)
        return router

    module.create_fused_moe_router = create_fused_moe_router


def install() -> None:
    """Change routers and runners when they are loaded, if the deployment names an experts plugin."""
    if chosen() is None:
        return
    when_imported(LAYER_MODULE, _wrap_factory)
    when_imported(MODEL_RUNNER_MODULE, _wrap)
    when_imported(CPU_RUNNER_MODULE, _wrap_cpu)
    when_imported(V2_RUNNER_MODULE, _wrap_v2)


_RUNNER = "v1/worker/gpu_model_runner.py"
_MOE = "model_executor/layers/fused_moe"

PATCH = VllmPatch(
    name="experts",
    purpose="experts plugins: which routed experts a step may use",
    requirements=(
        HasAttribute(f"{_MOE}/layer.py", "FusedMoEFactory"),
        References(f"{_MOE}/layer.py", "FusedMoEFactory", ("create_fused_moe_router",)),
        HasSignature(
            f"{_MOE}/router/base_router.py",
            "BaseRouter._compute_routing",
            ("self", "hidden_states", "router_logits", "indices_type"),
            exact=True,
        ),
        References(f"{_MOE}/router/base_router.py", "BaseRouter._select_experts", ("_compute_routing", "capture_fn")),
        References(f"{_MOE}/router/base_router.py", "BaseRouter.__init__", ("top_k", "global_num_experts")),
        References(
            f"{_MOE}/router/cpu_router.py",
            "CPURouter.__init__",
            (
                "use_grouped_topk",
                "num_expert_group",
                "topk_group",
                "renormalize",
                "scoring_func",
                "routed_scaling_factor",
                "e_score_correction_bias",
                "custom_routing_function",
                "_hash_indices_table",
            ),
        ),
        References(f"{_MOE}/router/fused_topk_router.py", "FusedTopKRouter.__init__", ("renormalize", "scoring_func")),
        References(
            f"{_MOE}/router/fused_topk_bias_router.py",
            "FusedTopKBiasRouter.__init__",
            ("renormalize", "scoring_func", "routed_scaling_factor", "e_score_correction_bias", "_hash_indices_table"),
        ),
        References(
            f"{_MOE}/router/grouped_topk_router.py",
            "GroupedTopKRouter.__init__",
            (
                "num_expert_group",
                "topk_group",
                "renormalize",
                "scoring_func",
                "routed_scaling_factor",
                "e_score_correction_bias",
            ),
        ),
        HasAttribute(f"{_MOE}/config.py", "RoutingMethodType.Custom"),
        HasAttribute(f"{_MOE}/runner/moe_runner.py", "MoERunner.is_monolithic"),
        References(f"{_MOE}/runner/moe_runner.py", "MoERunner.__init__", ("router", "layer_name", "moe_config")),
        References(_RUNNER, "GPUModelRunner.__init__", ("is_padding", "input_batch")),
        HasSignature(_RUNNER, "GPUModelRunner.load_model", ("self",)),
        HasSignature("v1/worker/cpu_model_runner.py", "CPUModelRunner.load_model", ("self",)),
        HasSignature(
            _RUNNER,
            "GPUModelRunner._prepare_inputs",
            ("self", "scheduler_output", "num_scheduled_tokens"),
            exact=True,
        ),
        References(
            _RUNNER, "GPUModelRunner.execute_model", ("_prepare_inputs", "_model_forward", "set_forward_context")
        ),
        HasSignature(_RUNNER, "GPUModelRunner._model_forward", ("self", "input_ids", "positions")),
        HasSignature(_RUNNER, "GPUModelRunner.sample_tokens", ("self",)),
        HasSignature(_RUNNER, "GPUModelRunner.initialize_kv_cache", ("self", "kv_cache_config")),
        HasAttribute("forward_context.py", "ForwardContext.moe_layer_index"),
        *(
            HasAttribute("config/parallel.py", f"ParallelConfig.{name}")
            for name in ("pipeline_parallel_size", "data_parallel_size", "enable_dbo")
        ),
        HasAttribute("config/vllm.py", "VllmConfig.additional_config"),
        References(
            "v1/worker/gpu_input_batch.py", "InputBatch.__init__", ("num_prompt_tokens", "num_computed_tokens_cpu")
        ),
        HasSignature("v1/worker/gpu/model_runner.py", "GPUModelRunner.__init__", ("self",)),
    ),
    slots=("experts",),
)
