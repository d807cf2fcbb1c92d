"""What was learned about a deployment, stored on disk for its next start.

One small JSON file per combination of what it depends on (device, model, dtype, vLLM version, drafter, …). A file that
cannot be read, or that has another format, is treated as missing.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import platformdirs

logger = logging.getLogger("vllm.instant")

FORMAT = 1


def default_folder(name: str) -> Path:
    """The folder of one kind of state unless the deployment names another one."""
    return Path(platformdirs.user_cache_dir("vllm-instant")) / name


class PersistentState:
    """The file of one deployment.

    Args:
        folder: folder of the files.
        identity: what the state depends on.
        name: kind of state; a key in the file, and a word in messages.

    """

    def __init__(self, folder: Path, identity: Mapping[str, str], name: str = "costs") -> None:
        self._name = name
        self._identity = dict(sorted(identity.items()))
        digest = hashlib.sha256(json.dumps(self._identity).encode()).hexdigest()[:16]
        self.path = folder / f"{digest}.json"
        self._writing: threading.Thread | None = None

    def load(self) -> dict[str, Any] | None:
        """The state that was saved for the same identity, or None."""
        with suppress(OSError, ValueError):
            stored = json.loads(self.path.read_text())
            if isinstance(stored, dict) and stored.get("format") == FORMAT and stored.get("identity") == self._identity:
                state = stored.get(self._name)
                return state if isinstance(state, dict) else None
        return None

    def save(self, state: Mapping[str, Any]) -> None:
        """Write now, replacing the file as a whole, after any write in the background has ended."""
        if self._writing is not None:
            self._writing.join()
        self._write(state)

    def _write(self, state: Mapping[str, Any]) -> None:
        partial = self.path.with_suffix(f".{os.getpid()}.part")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text(json.dumps({"format": FORMAT, "identity": self._identity, self._name: dict(state)}))
            partial.replace(self.path)
        except OSError as error:
            logger.warning("What was learned about %s was not kept: %s", self._name, error)

    def save_in_background(self, state: Mapping[str, Any]) -> None:
        """Write in a thread, so that no step waits for a disk; skipped while the last write is still running."""
        if self._writing is None or not self._writing.is_alive():
            self._writing = threading.Thread(target=self._write, args=(state,), daemon=True)
            self._writing.start()
