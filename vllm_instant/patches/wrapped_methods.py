"""Every method of vLLM that this package wraps, and the order of the features around it.

Each row is one method, and its tuple holds the features from the outermost to the innermost: the first one is called
first, sees the arguments before the others and the result after them.
"""

from __future__ import annotations

from vllm_instant.patches import (
    default_drafter,
    delta_parsing,
    draft_model_skip,
    drafter,
    engine_core,
    feed_forward,
    flags,
    full_graphs,
    fused_rope,
    guard,
    guard_whole,
    hybrid_drafting,
    min_p_logit_bias,
    moe,
    moe_reports,
    names,
    orphaned_processes,
    rejection_sampler,
    request_validation,
    shared_noise,
    skip_rejection_sampler,
    streaming,
    v2_adaptive_verification,
    v2_draft_model,
    v2_drafter,
    v2_hybrid,
    worker_reports,
)
from vllm_instant.patches.compat import VllmPatch
from vllm_instant.patches.cpu import generator_offset, numba_scan, single_rpc

_V1 = f"{names.MODEL_RUNNER}:GPUModelRunner"
_CPU = f"{names.CPU_MODEL_RUNNER}:CPUModelRunner"
_V2 = f"{names.V2_MODEL_RUNNER}:GPUModelRunner"
_CORE = f"{names.ENGINE_CORE}:EngineCore"
_PROPOSER = f"{names.PROPOSER}:SpecDecodeBaseProposer"
_INPUT = f"{names.INPUT_PROCESSOR}:InputProcessor"
_OUTPUT = f"{names.OUTPUT_PROCESSOR}:OutputProcessor"
_ARGUMENTS = f"{names.ENGINE_ARGUMENTS}:EngineArgs"
_PARSER = f"{names.ARGUMENT_PARSER}:FlexibleArgumentParser"
_LOADER = f"{names.MODEL_LOADER}:BaseModelLoader"

METHODS: dict[str, tuple[VllmPatch, ...]] = {
    # The V1 model runner. MoE plugins may refuse an engine before it is built; samplers are exchanged afterwards.
    f"{_V1}.__init__": (moe.PATCH, v2_drafter.PATCH, rejection_sampler.PATCH, full_graphs.PATCH),
    f"{_V1}.load_model": (moe.PATCH,),
    f"{_V1}.initialize_kv_cache": (moe.PATCH, hybrid_drafting.PATCH),
    f"{_V1}._update_states": (hybrid_drafting.PATCH, draft_model_skip.PATCH, drafter.PATCH),
    f"{_V1}._prepare_inputs": (moe.PATCH,),
    f"{_V1}._model_forward": (moe.PATCH,),
    f"{_V1}.sample_tokens": (moe.PATCH,),
    # Generators are restored around what the sampling of a step has become.
    f"{_V1}._sample": (generator_offset.PATCH, skip_rejection_sampler.PATCH),
    f"{_V1}._bookkeeping_sync": (generator_offset.PATCH,),
    f"{_V1}._get_spec_decode_draft_probs": (rejection_sampler.PATCH,),
    # A hybrid drafter decides what is left to the draft model; the draft model may then be skipped or catch up.
    f"{_V1}.propose_draft_token_ids": (hybrid_drafting.PATCH, draft_model_skip.PATCH, drafter.PATCH),
    f"{_V1}.take_draft_token_ids": (worker_reports.PATCH,),
    f"{names.MODEL_RUNNER}:build_logitsprocs": (min_p_logit_bias.PATCH,),
    # The draft model.
    f"{_PROPOSER}.propose": (shared_noise.PATCH,),
    f"{_PROPOSER}._sample_from_logits": (shared_noise.PATCH,),
    # The CPU's model runner derives from the V1 runner, whose wrappers run inside of these.
    f"{_CPU}.load_model": (moe.PATCH,),
    f"{_CPU}.execute_model": (single_rpc.PATCH,),
    f"{_CPU}.sample_tokens": (single_rpc.PATCH,),
    # The V2 model runner.
    f"{_V2}.__init__": (moe.PATCH, hybrid_drafting.PATCH),
    f"{_V2}.execute_model": (v2_adaptive_verification.PATCH,),
    f"{_V2}.finish_requests": (v2_drafter.PATCH,),
    f"{names.V2_MODEL_RUNNER}:init_speculator": (v2_drafter.PATCH,),
    f"{names.V2_REJECTION_SAMPLER}:RejectionSampler.__init__": (rejection_sampler.PATCH,),
    # The plugin's drafts may replace what the draft model has made, of as many as were planned.
    f"{names.V2_DRAFT_MODEL}:StandaloneARSpeculator.propose": (v2_hybrid.PATCH, v2_draft_model.PATCH),
    f"{names.V2_STATES}:RequestState.__init__": (v2_hybrid.PATCH,),
    f"{names.V2_NGRAM}:NgramGPUSpeculator.propose": (v2_draft_model.PATCH,),
    f"{names.V2_ADAPTIVE_VERIFICATION}:AdaptiveVerificationManager.get_num_tokens": (v2_adaptive_verification.PATCH,),
    # The engine core: drafts that came with the tokens are used before the engine core decides whether to fetch any.
    f"{_CORE}.post_step": (single_rpc.PATCH, engine_core.PATCH),
    f"{_CORE}.shutdown": (engine_core.PATCH,),
    f"{names.ENGINE_CORE}:EngineCoreProc._handle_shutdown": (engine_core.PATCH,),
    f"{names.ENGINE_CORE}:EngineCoreProc.run_busy_loop": (orphaned_processes.PATCH,),
    f"{names.ENGINE_CORE}:DPEngineCoreProc.run_busy_loop": (orphaned_processes.PATCH,),
    f"{names.SCHEDULER}:Scheduler.update_from_output": (single_rpc.PATCH, moe_reports.PATCH),
    # The front end.
    f"{_INPUT}.__init__": (min_p_logit_bias.PATCH,),
    f"{_INPUT}.process_inputs": (request_validation.PATCH, guard.PATCH),
    f"{names.INPUT_PROCESSOR}:SamplingParams._validate_spec_decode": (min_p_logit_bias.PATCH,),
    f"{names.OUTPUT_PARSER}:DelegatingParser.parse_delta": (delta_parsing.PATCH,),
    f"{_OUTPUT}._update_stats_from_output": (streaming.PATCH,),
    f"{_OUTPUT}._update_stats_from_finished": (streaming.PATCH,),
    f"{names.ASYNC_LLM}:AsyncLLM.__init__": (guard.PATCH,),
    f"{names.LLM_ENGINE}:LLMEngine.__init__": (guard.PATCH,),
    f"{_OUTPUT}.add_request": (guard.PATCH,),
    f"{_OUTPUT}.process_outputs": (guard.PATCH,),
    f"{names.OUTPUT_PROCESSOR}:RequestState.make_request_output": (guard.PATCH,),
    f"{names.OUTPUT_PROCESSOR}:RequestState._new_completion_output": (guard.PATCH,),
    "vllm.entrypoints.generate.beam_search.online:BeamSearchOnlineMixin.beam_search": (guard_whole.PATCH,),
    "vllm.entrypoints.openai.responses.protocol:ResponsesResponse.from_request": (guard_whole.PATCH,),
    f"{_ARGUMENTS}.add_cli_args": (flags.PATCH,),
    f"{_ARGUMENTS}.create_engine_config": (flags.PATCH,),
    f"{_ARGUMENTS}.create_speculative_config": (default_drafter.PATCH, v2_drafter.PATCH),
    f"{names.CONFIG}:VllmConfig._maybe_disable_dynamic_sd_for_data_parallel": (full_graphs.PATCH,),
    f"{_PARSER}.load_config_file": (flags.PATCH,),
    f"{_PARSER}._pull_args_from_config": (flags.PATCH,),
    f"{_PARSER}.parse_args": (flags.PATCH,),
    # Models: the rotation of keys is fused in a loaded model before its feed-forward layers are exchanged.
    f"{_LOADER}.create_model": (feed_forward.PATCH,),
    f"{_LOADER}.load_model": (feed_forward.PATCH, fused_rope.PATCH),
    f"{names.FUSED_MOE_LAYER}:create_fused_moe_router": (moe.PATCH,),
    # The CPU build.
    f"{numba_scan.DISPATCHER_MODULE}:_rebind_kernels": (numba_scan.PATCH,),
}
