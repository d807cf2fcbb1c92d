"""Names that several patches share: vLLM's modules, and the attributes that this package puts on vLLM's objects."""

from __future__ import annotations

MODEL_RUNNER = "vllm.v1.worker.gpu_model_runner"
CPU_MODEL_RUNNER = "vllm.v1.worker.cpu_model_runner"
V2_MODEL_RUNNER = "vllm.v1.worker.gpu.model_runner"
V2_REJECTION_SAMPLER = "vllm.v1.worker.gpu.spec_decode.rejection_sampler"
WORKER_BASE = "vllm.v1.worker.worker_base"
SCHEDULER = "vllm.v1.core.sched.scheduler"
ENGINE_CORE = "vllm.v1.engine.core"
PROPOSER = "vllm.v1.spec_decode.llm_base_proposer"
INPUT_PROCESSOR = "vllm.v1.engine.input_processor"
OUTPUT_PROCESSOR = "vllm.v1.engine.output_processor"
ENGINE_ARGUMENTS = "vllm.engine.arg_utils"
ARGUMENT_PARSER = "vllm.utils.argparse_utils"
MODEL_LOADER = "vllm.model_executor.model_loader"
FUSED_MOE_LAYER = "vllm.model_executor.layers.fused_moe.layer"

QUALIFIED_NAME = "vllm_instant.patches.scheduler.create_scheduler"
"""The scheduler of this package as ``--scheduler-cls`` names it."""
PLAN_ATTRIBUTE = "instant_draft_plan"
"""On a SchedulerOutput: its ``DraftPlan``; travels to the workers with it."""
REPORT_ATTRIBUTE = "instant_draft_report"
"""On DraftTokenIds: the workers' ``DraftReport``, where they may do less than was planned."""
EXPERTS_ATTRIBUTE = "instant_experts"
"""On a model runner: its ``MoeWorker``. On its output: that worker's report."""
PLACEHOLDER = -1
"""What vLLM schedules in the place of a draft token that it does not have (yet)."""
