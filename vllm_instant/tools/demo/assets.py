"""The repository's own small models: the demo pair, unpacked and expanded into a cache folder."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from vllm_instant.deployment.user_cache import user_cache
from vllm_instant.tools.demo import widen_model

ASSETS = Path(__file__).resolve().parents[3] / "examples/demo_models"
"""In a clone. The weights are not part of the installed package."""
DRAFT_IN_ASSETS = "draft"
BASE_IN_ASSETS = "base"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


@dataclass(frozen=True)
class Pair:
    """Folders that vLLM can load."""

    target: Path
    draft: Path


def prepare(
    output: Path | None = None,
    size: widen_model.Size = widen_model.MEDIUM,
    dtype: str = "bfloat16",
    assets: Path = ASSETS,
) -> Pair:
    """Expand the base model and put the draft model beside it; returns at once when that was done before.

    Args:
        output: folder to write to; by default one in the user's cache, named after its content.
        size: shape of the target.
        dtype: ``bfloat16`` or ``float32``, for both models.
        assets: folder of the stored models.

    Raises:
        FileNotFoundError: when the stored models are not there.

    """
    weights = stored(assets / BASE_IN_ASSETS / "model.safetensors")
    fingerprint = hashlib.sha256(weights.read_bytes() + repr((size, dtype)).encode()).hexdigest()[:12]

    def make(folder: Path) -> None:
        import torch
        from transformers import LlamaForCausalLM

        torch_dtype = getattr(torch, dtype)
        base = LlamaForCausalLM.from_pretrained(assets / BASE_IN_ASSETS, dtype=torch.float32)
        widen_model.expand(base, size).to(torch_dtype).save_pretrained(folder / "target")
        draft = LlamaForCausalLM.from_pretrained(assets / DRAFT_IN_ASSETS, dtype=torch_dtype)
        draft.save_pretrained(folder / "draft")
        for model in ("target", "draft"):
            copy_tokenizer(assets / BASE_IN_ASSETS, folder / model)

    folder = made_once(output or cache_folder(f"demo-{fingerprint}"), fingerprint, make)
    return Pair(folder / "target", folder / "draft")


def stored(weights: Path) -> Path:
    """The file itself; raises FileNotFoundError with the remedy where it does not exist."""
    if not weights.is_file():
        raise FileNotFoundError(
            f"no {weights}: the demo models are not part of the installed package; clone the repository and run "
            "`make demo` there"
        )
    return weights


def cache_folder(name: str) -> Path:
    """A folder of this name in the user's cache."""
    return user_cache(name)


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy the demo's tokenizer into a model's folder."""
    for name in TOKENIZER_FILES:
        shutil.copy(source / name, folder / name)


def made_once(folder: Path, fingerprint: str, make: Callable[[Path], None]) -> Path:
    """Fill a folder, unless an earlier call with this fingerprint completed it; returns the folder."""
    marker = folder / "complete"
    if marker.is_file() and marker.read_text() == fingerprint:
        return folder
    from transformers.utils import logging

    # The demo has a progress line of its own; bars of single files would break it.
    logging.disable_progress_bar()
    marker.unlink(missing_ok=True)
    make(folder)
    marker.write_text(fingerprint)
    return folder
