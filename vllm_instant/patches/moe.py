"""Experts plugins: which routed experts the tokens of a step may use.

Routers are changed where vLLM makes them, so that it chooses kernels that accept the router's result. They start to ask
the plugin once the target model is loaded; those of a draft model never do. Before each forward pass the kinds of its
rows are set. Where the plugin asks for it, the step first runs as a reference pass with the model's own routing. The
second pass writes its keys and values to the same slots, so that the KV cache belongs to the answers.
"""

from __future__ import annotations

import logging
from typing import Any

import numpy as np

from vllm_instant.deployment import deployment_env
from vllm_instant.deployment.slots import SLOTS
from vllm_instant.interfaces.deployment import Deployment
from vllm_instant.interfaces.experts import ExpertLayer, StepRows
from vllm_instant.patches import moe_routers
from vllm_instant.patches.compat import HasAttribute, HasSignature, References, VllmPatch
from vllm_instant.patches.moe_worker import MoeWorker
from vllm_instant.patches.names import (
    CPU_MODEL_RUNNER,
    EXPERTS_ATTRIBUTE,
    FUSED_MOE_LAYER,
    MODEL_RUNNER,
    V2_MODEL_RUNNER,
)
from vllm_instant.patches.plugin_factory import PluginStartError, build_guarded, context_of

logger = logging.getLogger("vllm.instant")

CLASS_KEY = "instant_prompt_class"
"""The key in ``vllm_xargs`` with which a client names its kind of prompt in traces."""
CACHE_KEY = "vllm_instant_experts"
"""In ``additional_config``: separates compiled graphs with this package's operator from vLLM's in its compile cache."""


def chosen() -> Deployment | None:
    """The deployment, if it names an experts plugin."""
    deployment = deployment_env.get_deployment()
    # From the name alone: a worker must not load plugins this early (see activation.activate).
    if deployment is None or deployment.slots["experts"].plugin == SLOTS["experts"].default:
        return None
    return deployment


def is_chosen() -> bool:
    """Whether the deployment names an experts plugin."""
    return chosen() is not None


def unsupported_reason(vllm_config: Any) -> str | None:
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
    """The routers of a model's MoE layers, with their descriptions for plugins.

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
        # With redundant replicas (EPLB) there are more physical experts; routers pick logical ones.
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
    if deployment is None or getattr(runner, EXPERTS_ATTRIBUTE, None) is not None:
        return
    name = deployment.slots["experts"].plugin
    layers = served_layers(runner.get_model(), name)
    plugin = build_guarded("experts", deployment, context_of(runner.vllm_config, deployment))
    if plugin is None:
        return
    worker = MoeWorker(plugin, len(runner.is_padding), runner.device)
    try:
        worker.serve(layers)
    except ValueError as error:
        raise PluginStartError(f"plugin {name} of slot experts cannot start: {error}") from error
    setattr(runner, EXPERTS_ATTRIBUTE, worker)


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
    """The requests that the rows of a step belong to, and each request's number of draft tokens."""
    batch = runner.input_batch
    requests = len(scheduled)
    ids = batch.req_ids[:requests]
    drafts_of = scheduler_output.scheduled_spec_decode_tokens
    drafts = [len(drafts_of.get(request_id, ())) for request_id in ids]
    computed = batch.num_computed_tokens_cpu[:requests].astype(np.int64)
    # One new token and the drafts after it. A preempted request that reads its tokens again is not decoding.
    is_decode = (computed >= batch.num_prompt_tokens[:requests]) & (scheduled <= 1 + np.array(drafts, np.int64))
    classes = [_prompt_class(runner.requests[request_id]) for request_id in ids]
    starts = np.concatenate([[0], np.cumsum(scheduled, dtype=np.int64)])
    return StepRows(number, ids, starts, is_decode, classes, computed), drafts


def _prompt_class(request: Any) -> str:
    extra = getattr(request.sampling_params, "extra_args", None)
    return str(extra[CLASS_KEY]) if extra and CLASS_KEY in extra else ""


def _init_runner(initialize: Any, runner: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
    """Refuse an engine that cannot serve experts plugins, before it is built."""
    deployment = chosen()
    if deployment is not None:
        name = deployment.slots["experts"].plugin
        reason = unsupported_reason(vllm_config)
        if reason is not None:
            raise PluginStartError(f"plugin {name} of slot experts cannot serve: {reason}")
        additional = vllm_config.additional_config
        if isinstance(additional, dict):
            vllm_config.additional_config = {**additional, CACHE_KEY: "route"}
    initialize(vllm_config, *args, **kwargs)


def _load_model(load: Any, runner: Any, *args: Any, **kwargs: Any) -> Any:
    loaded = load(*args, **kwargs)
    _attach(runner)
    return loaded


def _initialize_kv_cache(initialize: Any, runner: Any, *args: Any, **kwargs: Any) -> Any:
    initialized = initialize(*args, **kwargs)
    worker = getattr(runner, EXPERTS_ATTRIBUTE, None)
    if worker is not None:
        worker.shadow_objection = objection_to_shadow(runner)
    return initialized


def _prepare_inputs(prepare: Any, runner: Any, scheduler_output: Any, num_scheduled_tokens: Any) -> Any:
    prepared = prepare(scheduler_output, num_scheduled_tokens)
    worker = getattr(runner, EXPERTS_ATTRIBUTE, None)
    if worker is not None:
        worker.begin(*rows_of(runner, scheduler_output, num_scheduled_tokens, worker.number + 1))
        # The rows that will be sampled from; vLLM computes them on the device only.
        runner.instant_sampled_rows = prepared[0] if worker.wants_shadow else None
    return prepared


def _model_forward(forward: Any, runner: Any, *args: Any, **kwargs: Any) -> Any:
    """Run the step, and before it the reference pass if the plugin asks for one."""
    worker = getattr(runner, EXPERTS_ATTRIBUTE, None)
    if worker is None:
        return forward(*args, **kwargs)
    rows = None
    if worker.wants_shadow:
        rows = worker.compared_rows(runner.instant_sampled_rows)
    if rows is not None and len(rows):
        reference = _reference_pass(worker, rows, lambda: forward(*args, **kwargs))
        worker.before_forward()
        output = forward(*args, **kwargs)
        _compare(runner, worker, reference, _hidden(output)[rows])
    else:
        worker.before_forward()
        output = forward(*args, **kwargs)
    worker.finish()
    return output


def _sample_tokens(sample: Any, runner: Any, *args: Any, **kwargs: Any) -> Any:
    output = sample(*args, **kwargs)
    worker = getattr(runner, EXPERTS_ATTRIBUTE, None)
    if worker is not None and output is not None:
        report = worker.report()
        if report is not None:
            # Under asynchronous scheduling the output that is sent is an attribute of the returned one.
            setattr(getattr(output, "_model_runner_output", output), EXPERTS_ATTRIBUTE, report)
    return output


def _hidden(output: Any) -> Any:
    return output[0] if isinstance(output, tuple) else output


def _reference_pass(worker: MoeWorker, rows: Any, run: Any) -> Any:
    """The hidden states of some rows with the model's own routing."""
    from vllm.forward_context import get_forward_context

    worker.reference_pass(True)
    try:
        # A replayed graph writes its next output to the same memory; indexing copies.
        return _hidden(run())[rows]
    finally:
        worker.reference_pass(False)
        # MoE layers find their index by counting calls within one forward context.
        get_forward_context().moe_layer_index = 0


def _compare(runner: Any, worker: MoeWorker, reference: Any, served: Any) -> None:
    from vllm.distributed import get_tp_group

    model = runner.get_model()
    reference_logits, served_logits = model.compute_logits(reference), model.compute_logits(served)
    group = get_tp_group()
    # Only the first worker may have the logits, and all workers must come to the same decisions.
    has_no_logits = served_logits is None
    sums = worker.nothing_compared() if has_no_logits else worker.compare(reference_logits, served_logits)
    worker.add_comparison(group.broadcast(sums, src=0) if group.world_size > 1 else sums)


def _init_v2_runner(initialize: Any, runner: Any, *args: Any, **kwargs: Any) -> None:
    deployment = chosen()
    if deployment is not None:
        raise PluginStartError(
            f"plugin {deployment.slots['experts'].plugin} of slot experts needs vLLM's V1 model runner: set "
            "VLLM_USE_V2_MODEL_RUNNER=0"
        )
    initialize(*args, **kwargs)


def _create_router(create: Any, *args: Any, **kwargs: Any) -> Any:
    router = create(*args, **kwargs)
    moe_routers.adopt(router)
    return router


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
    wraps={
        f"{MODEL_RUNNER}:GPUModelRunner.__init__": _init_runner,
        f"{MODEL_RUNNER}:GPUModelRunner.load_model": _load_model,
        f"{MODEL_RUNNER}:GPUModelRunner.initialize_kv_cache": _initialize_kv_cache,
        f"{MODEL_RUNNER}:GPUModelRunner._prepare_inputs": _prepare_inputs,
        f"{MODEL_RUNNER}:GPUModelRunner._model_forward": _model_forward,
        f"{MODEL_RUNNER}:GPUModelRunner.sample_tokens": _sample_tokens,
        f"{CPU_MODEL_RUNNER}:CPUModelRunner.load_model": _load_model,
        f"{V2_MODEL_RUNNER}:GPUModelRunner.__init__": _init_v2_runner,
        f"{FUSED_MOE_LAYER}:create_fused_moe_router": _create_router,
    },
    is_wanted=is_chosen,
)
