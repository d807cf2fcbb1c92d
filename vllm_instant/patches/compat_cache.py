"""Remember which patches fit an installation, so that only its first server start reads vLLM's sources.

The key covers this package's version, every requirement, and size and modification time of every file that is read:
after any change the check runs again. A cache that cannot be read or written is ignored.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

from vllm_instant.deployment.user_cache import user_cache
from vllm_instant.patches.compat import VllmPatch, forget_sources

CACHE = user_cache("patches.json")


def unsupported_reason(patches: Sequence[VllmPatch], vllm: Path, cache: Path = CACHE) -> dict[str, str | None]:
    """By patch name, None where it fits the package folder ``vllm``, else what is different."""
    key = _fingerprint(patches, vllm)
    # Whatever the file holds, the server must start: JSON that is nested too deeply raises RecursionError.
    with suppress(Exception):
        stored = json.loads(cache.read_text()) if cache.is_file() else {}
        found = stored["unsupported_reason"] if stored.get("key") == key else {}
        if found.keys() == {patch.name for patch in patches}:
            return {name: None if reason is None else str(reason) for name, reason in found.items()}
    verdicts = {patch.name: patch.unsupported_reason(vllm) for patch in patches}
    forget_sources()
    with suppress(OSError):
        cache.parent.mkdir(parents=True, exist_ok=True)
        partial = cache.with_suffix(".part")
        partial.write_text(json.dumps({"key": key, "unsupported_reason": verdicts}))
        partial.replace(cache)
    return verdicts


def _fingerprint(patches: Sequence[VllmPatch], vllm: Path) -> str:
    digest = hashlib.sha256(f"{version('vllm-instant')}|{vllm}".encode())
    for patch in patches:
        digest.update(f"{patch.name}{patch.requirements!r}".encode())
        for file in sorted({requirement.file for requirement in patch.requirements}):
            with suppress(OSError):
                status = (vllm / file).stat()
                digest.update(f"{file}|{status.st_size}|{status.st_mtime_ns}".encode())
    return digest.hexdigest()
