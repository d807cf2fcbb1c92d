"""What vLLM's own configuration code chooses for deployments on a pretended H100; prints a table as JSON.

    python -m v2.configurations MODEL DRAFT

Each row goes through ``EngineArgs.create_engine_config`` with this package's flags, as ``vllm serve`` does.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

DEPLOYMENTS = {
    "defaults": "",
    "speculation off": '[speculation]\nplugin = "off"\n',
    "suffix": '[drafter]\nplugin = "suffix"\n',
    "ngram": '[drafter]\nplugin = "ngram"\nnum_speculative_tokens = 4\n',
    "model": '[drafter]\nplugin = "model"\nmodel = "DRAFT"\nnum_speculative_tokens = 4\n',
    "model, similarity": (
        '[drafter]\nplugin = "model"\nmodel = "DRAFT"\nnum_speculative_tokens = 4\n[batching]\nplugin = "similarity"\n'
    ),
    "model, token sampler": (
        '[drafter]\nplugin = "model"\nmodel = "DRAFT"\nnum_speculative_tokens = 4\n'
        '[rejection_sampler]\nplugin = "token"\n'
    ),
    "model, fixed length": (
        '[speculation]\nplugin = "fixed"\n[drafter]\nplugin = "model"\nmodel = "DRAFT"\nnum_speculative_tokens = 4\n'
    ),
    "model, relaxed sampler": (
        '[drafter]\nplugin = "model"\nmodel = "DRAFT"\nnum_speculative_tokens = 4\n'
        '[rejection_sampler]\nplugin = "relaxed"\nepsilon = 0.2\n'
    ),
    "hybrid": '[drafter]\nplugin = "hybrid"\nmodel = "DRAFT"\nnum_speculative_tokens = 4\n',
}
VLLM_ALONE: dict[str, dict[str, Any]] = {
    "no speculation": {},
    "ngram": {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 4},
    "ngram_gpu": {"method": "ngram_gpu", "num_speculative_tokens": 4, "prompt_lookup_max": 4},
    "draft_model": {"method": "draft_model", "model": "DRAFT", "num_speculative_tokens": 4},
    "draft_model, scheduled lengths": {
        "method": "draft_model",
        "model": "DRAFT",
        "num_speculative_tokens": 4,
        "num_speculative_tokens_per_batch_size": [[1, 60, 4], [61, 61, 2], [62, 62, 1], [63, 64, 0]],
    },
}
PARALLEL: dict[str, dict[str, int]] = {
    "1 GPU": {},
    "TP 2": {"tensor_parallel_size": 2},
    "DP 2": {"data_parallel_size": 2},
    "PP 2": {"pipeline_parallel_size": 2},
}


def chosen(model: str, **arguments: Any) -> str:
    """Runner, scheduling, CUDA graphs, speculation method and limits of a server, or vLLM's refusal."""
    from vllm.engine.arg_utils import EngineArgs

    from vllm_instant.deployment import deployment_env
    from vllm_instant.patches.deployment_check import findings_of
    from vllm_instant.patches.full_graphs import full_graphs_of

    try:
        config = EngineArgs(model=model, max_model_len=512, dtype="bfloat16", **arguments).create_engine_config()
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]
    speculative = config.speculative_config
    parts = [
        "V2" if config.use_v2_model_runner else "V1",
        "async" if config.scheduler_config.async_scheduling else "sync",
        config.compilation_config.cudagraph_mode.name,
        speculative.method if speculative else "no speculation",
    ]
    if speculative and speculative.uses_dynamic_speculative_decoding():
        parts.append("scheduled lengths")
    graphs, deployment = full_graphs_of(config), deployment_env.get_deployment()
    if graphs is not None:
        parts.append(f"graphs of {' '.join(map(str, graphs.lengths))} drafts")
    findings = [] if deployment is None else findings_of(config, deployment)
    return "; ".join([", ".join(parts), *(f"{found.slot} {found.verdict}" for found in findings)])


def rows_of_vllm(model: str, draft: str) -> dict[str, str]:
    """The rows of vLLM alone; the deployments' patches are not active in this process."""
    rows = {}
    for name, speculative in VLLM_ALONE.items():
        config = {key: draft if value == "DRAFT" else value for key, value in speculative.items()} or None
        for parallel, sizes in PARALLEL.items():
            rows[f"vLLM alone: {name}, {parallel}"] = chosen(model, speculative_config=config, **sizes)
    return rows


def rows_of_deployment(model: str, draft: str, name: str) -> dict[str, str]:
    """The rows of one deployment; a process serves one deployment only."""
    from vllm_instant.register import register

    register()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "deploy.toml"
        file.write_text(DEPLOYMENTS[name].replace("DRAFT", draft))
        served = {"additional_config": {"vllm_instant": str(file)}}
        return {f"{name}, {parallel}": chosen(model, **served, **sizes) for parallel, sizes in PARALLEL.items()}


def main() -> None:
    """Print all rows. Each deployment is forked from this process, which has imported vLLM once."""
    os.environ |= {"VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1", "VLLM_PLUGINS": ""}
    from vllm_instant.patches import pretended_device

    pretended_device.pretend()
    model, draft = sys.argv[1:]
    rows = rows_of_vllm(model, draft)
    for name in DEPLOYMENTS:
        with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as process:
            rows |= process.submit(rows_of_deployment, model, draft, name).result()
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
