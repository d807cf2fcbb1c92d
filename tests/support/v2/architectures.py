"""Which architectures get the default drafter on this machine, by vLLM's own configuration; prints JSON.

    python -m v2.architectures

Each row is a model folder that has a small configuration and no weights.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 256,
    "max_position_embeddings": 512,
    "torch_dtype": "float32",
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {"model_type": "llama"},
    "Qwen3MoeForCausalLM": {"model_type": "qwen3_moe", "num_experts": 4, "moe_intermediate_size": 64},
    "Lfm2ForCausalLM": {"model_type": "lfm2", "layer_types": ["conv", "full_attention"]},
    "GraniteMoeHybridForCausalLM": {"model_type": "granitemoehybrid", "layer_types": ["mamba", "attention"]},
    "Qwen3NextForCausalLM": {"model_type": "qwen3_next", "layer_types": ["linear_attention", "full_attention"]},
    "Mamba2ForCausalLM": {"model_type": "mamba2", "num_heads": 4, "head_dim": 32, "state_size": 16, "expand": 2},
}


def drafter_of(folder: Path, architecture: str) -> str:
    """The speculative method that a server of this architecture gets, or the first line of vLLM's refusal."""
    from vllm.engine.arg_utils import EngineArgs

    model = folder / architecture
    model.mkdir()
    (model / "config.json").write_text(
        json.dumps(SIZES | ARCHITECTURES[architecture] | {"architectures": [architecture]})
    )
    try:
        config = EngineArgs(
            model=str(model),
            skip_tokenizer_init=True,
            max_model_len=256,
            additional_config={"vllm_instant": True},
        ).create_engine_config()
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]
    return config.speculative_config.method if config.speculative_config else "no drafter"


def main() -> None:
    """Print the method of each architecture."""
    os.environ |= {"VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1", "VLLM_PLUGINS": ""}
    from vllm_instant.register import register

    register()
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps({name: drafter_of(Path(folder), name) for name in ARCHITECTURES}))


if __name__ == "__main__":
    main()
