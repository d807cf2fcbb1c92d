"""Tiny random models with recurrent layers, answered by vLLM alone and with the default deployment; prints JSON.

    python -m architectures NAME FOLDER

``NAME`` is one of ``CONFIGS``; the model is written to ``FOLDER``. The sizes are what the CPU's kernels support.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

_SHAPE = {
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}


def _lfm2(transformers: Any, **vocabulary: int) -> Any:
    convolutions = {"conv_dim": 128, "conv_dim_out": 128, "block_dim": 128, "block_ff_dim": 128}
    layers = ["conv", "conv", "full_attention", "conv"]
    return transformers.Lfm2Config(
        **_SHAPE, **vocabulary, **convolutions, layer_types=layers, block_multiple_of=8, tie_embedding=False
    )


def _granite_hybrid(transformers: Any, **vocabulary: int) -> Any:
    mamba = {"mamba_n_heads": 8, "mamba_d_head": 32, "mamba_d_state": 16, "mamba_n_groups": 1, "mamba_expand": 2}
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    layers = ["mamba", "mamba", "attention", "mamba"]
    return transformers.GraniteMoeHybridConfig(
        **_SHAPE, **vocabulary, **mamba, **experts, layer_types=layers, intermediate_size=64,
        shared_intermediate_size=64, position_embedding_type="rope",
    )  # fmt: skip


def _qwen3_next(transformers: Any, **vocabulary: int) -> Any:
    linear = {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
    linear |= {"linear_key_head_dim": 128, "linear_value_head_dim": 128}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
    return transformers.Qwen3NextConfig(
        **_SHAPE, **vocabulary, **linear, **experts, head_dim=32, intermediate_size=128,
        shared_expert_intermediate_size=64, full_attention_interval=4,
    )  # fmt: skip


def _mamba2(transformers: Any, **vocabulary: int) -> Any:
    return transformers.Mamba2Config(
        **vocabulary, hidden_size=64, num_heads=8, head_dim=16, state_size=16, n_groups=1, num_hidden_layers=3
    )


CONFIGS: dict[str, tuple[Callable[..., Any], str]] = {
    "lfm2": (_lfm2, "float32"),
    "granite_hybrid": (_granite_hybrid, "float32"),
    "qwen3_next": (_qwen3_next, "bfloat16"),
    "mamba2": (_mamba2, "float32"),
}
"""Configurations, and the number format that the CPU's kernels want."""
PROMPTS = [
    "def add(self, name):\n    self.names.append(name)\n" * 3,
    "Once upon a time",
    '{"a": 1, "b": 2, "a": 1, "b":',
    "x = 1\nx = 1\nx = 1\n",
]


def write_model(name: str, folder: Path) -> None:
    """Write a random model of this architecture with the demo's tokenizer."""
    import torch
    import transformers

    from vllm_instant.tools.demo import assets

    tokenizer = transformers.AutoTokenizer.from_pretrained(str(assets.prepare().target))
    torch.manual_seed(0)
    config = CONFIGS[name][0](transformers, vocab_size=len(tokenizer))
    transformers.AutoModelForCausalLM.from_config(config).to(torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def answer(folder: str, dtype: str, ours: bool) -> dict[str, Any]:
    """Greedy answers to ``PROMPTS``."""
    from vllm import LLM, SamplingParams

    arguments: dict[str, Any] = {"additional_config": {"vllm_instant": ""}} if ours else {}
    llm = LLM(folder, enforce_eager=True, max_model_len=256, max_num_seqs=4, dtype=dtype, **arguments)
    core: Any = llm.llm_engine.engine_core.engine_core  # type: ignore[attr-defined]
    answers = llm.generate(PROMPTS, SamplingParams(temperature=0.0, max_tokens=32, ignore_eos=True), use_tqdm=False)
    return {
        "scheduler": type(core.scheduler).__name__,
        "speculates": core.vllm_config.speculative_config is not None,
        "token_ids": [list(given.outputs[0].token_ids) for given in answers],
    }


def main() -> None:
    """Write the model, then answer twice, each time in a fork of this process, which has imported vLLM once."""
    name, folder = sys.argv[1:]
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_PLUGINS": "vllm_instant",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "HF_HUB_OFFLINE": "1",
    }
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(1, context) as process:
        process.submit(write_model, name, Path(folder)).result()
    import vllm.entrypoints.llm
    import vllm.v1.engine.core  # noqa: F401

    for ours in (False, True):
        with ProcessPoolExecutor(1, context) as process:
            print(json.dumps(process.submit(answer, folder, CONFIGS[name][1], ours).result()), flush=True)


if __name__ == "__main__":
    main()
