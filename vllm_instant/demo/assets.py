"""The committed demo pair, unpacked and expanded into a cache folder."""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import dataclass
from pathlib import Path

import platformdirs

from vllm_instant.demo import expand

ASSETS = Path(__file__).parent / "assets"
DRAFT_IN_ASSETS = "draft"
BASE_IN_ASSETS = "base"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


@dataclass(frozen=True)
class Pair:
    """Folders that vLLM can load."""

    target: Path
    draft: Path


def prepare(
    output: Path | None = None, size: expand.Size = expand.MEDIUM, dtype: str = "bfloat16", assets: Path = ASSETS
) -> Pair:
    """Expand the base and lay the draft beside it; returns at once when that was done before.

    Args:
        output: folder to write to; by default one in the user's cache, named after what goes into it.
        size: shape of the target.
        dtype: ``bfloat16`` or ``float32``, of both models.
        assets: where the committed pair lies.

    Raises:
        FileNotFoundError: when the committed pair is not there.

    """
    weights = assets / BASE_IN_ASSETS / "model.safetensors"
    if not weights.is_file():
        raise FileNotFoundError(f"the demo models are missing: no {weights}")
    fingerprint = hashlib.sha256(weights.read_bytes() + repr((size, dtype)).encode()).hexdigest()[:12]
    folder = output or Path(platformdirs.user_cache_dir("vllm-instant")) / f"demo-{fingerprint}"
    pair = Pair(folder / "target", folder / "draft")
    marker = folder / "complete"
    if marker.is_file() and marker.read_text() == fingerprint:
        return pair

    import torch
    from transformers import LlamaForCausalLM
    from transformers.utils import logging

    # The demo has a progress line of its own; bars of single files would break it.
    logging.disable_progress_bar()
    marker.unlink(missing_ok=True)
    torch_dtype = getattr(torch, dtype)
    base = LlamaForCausalLM.from_pretrained(assets / BASE_IN_ASSETS, dtype=torch.float32)
    expand.expand(base, size).to(torch_dtype).save_pretrained(pair.target)
    draft = LlamaForCausalLM.from_pretrained(assets / DRAFT_IN_ASSETS, dtype=torch_dtype)
    draft.save_pretrained(pair.draft)
    for name in TOKENIZER_FILES:
        for model in (pair.target, pair.draft):
            shutil.copy(assets / BASE_IN_ASSETS / name, model / name)
    marker.write_text(fingerprint)
    return pair
