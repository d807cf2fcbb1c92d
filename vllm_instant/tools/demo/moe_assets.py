"""The repository's mixture of experts: stored in eight bits per weight, unpacked and expanded into a cache folder."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_instant.tools.demo import widen_experts
from vllm_instant.tools.demo.assets import ASSETS, BASE_IN_ASSETS, cache_folder, copy_tokenizer, made_once, stored

if TYPE_CHECKING:
    import torch
    from transformers import MixtralForCausalLM

MOE_IN_ASSETS = "moe"
WEIGHTS = "model.safetensors"
_SCALE = ".scale"


def store(model: MixtralForCausalLM, folder: Path) -> None:
    """Write configuration and weights; matrices as int8 with one scale per vector along the hidden size.

    Routers and norms stay in bfloat16: they are small, and errors in them change many outputs.
    """
    import torch
    from safetensors.torch import save_file

    stored: dict[str, torch.Tensor] = {}
    for name, value in model.state_dict().items():
        if name == "lm_head.weight":  # tied
            continue
        axis = _quantised_axis(name, value)
        if axis is None:
            stored[name] = value.to(torch.bfloat16).contiguous()
            continue
        # The scale is rounded first, so that the integers belong to the scale that is stored.
        scale = (value.abs().amax(axis, keepdim=True).clamp_min(1e-8) / 127).to(torch.bfloat16)
        stored[name] = (value / scale.float()).round().clamp(-127, 127).to(torch.int8).contiguous()
        stored[name + _SCALE] = scale.contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    model.config.save_pretrained(folder)
    save_file(stored, folder / WEIGHTS)


def load(folder: Path) -> MixtralForCausalLM:
    """The model as it was stored, float32, in evaluation mode."""
    from safetensors.torch import load_file
    from transformers import MixtralConfig, MixtralForCausalLM

    stored = load_file(folder / WEIGHTS)
    weights = {
        name: value.float() * stored[name + _SCALE].float() if name + _SCALE in stored else value.float()
        for name, value in stored.items()
        if not name.endswith(_SCALE)
    }
    model = MixtralForCausalLM(MixtralConfig.from_pretrained(folder)).float()
    model.load_state_dict(weights, strict=False)
    model.tie_weights()
    return model.eval()


def _quantised_axis(name: str, value: Any) -> int | None:
    if value.ndim < 2 or name.endswith("mlp.gate.weight"):
        return None
    return 1 if name.endswith("down_proj") else -1


def prepare(
    output: Path | None = None,
    size: widen_experts.ExpertSize = widen_experts.MEDIUM,
    dtype: str = "bfloat16",
    assets: Path = ASSETS,
) -> Path:
    """Unpack and expand the mixture of experts; returns its folder, at once when that was done before.

    Args:
        output: folder to write to; by default one in the user's cache, named after its content.
        size: shape of the served model.
        dtype: ``bfloat16`` or ``float32``.
        assets: folder of the stored models.

    Raises:
        FileNotFoundError: when the stored model is not there.

    """
    weights = stored(assets / MOE_IN_ASSETS / WEIGHTS)
    fingerprint = hashlib.sha256(weights.read_bytes() + repr((size, dtype)).encode()).hexdigest()[:12]

    def make(folder: Path) -> None:
        import torch

        model = load(assets / MOE_IN_ASSETS)
        widen_experts.expand_experts(model, size).to(getattr(torch, dtype)).save_pretrained(folder)
        copy_tokenizer(assets / BASE_IN_ASSETS, folder)

    return made_once(output or cache_folder(f"demo-moe-{fingerprint}"), fingerprint, make)
