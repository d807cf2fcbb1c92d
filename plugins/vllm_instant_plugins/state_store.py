"""What was learned about a deployment, kept on disk for its next start.

One small JSON file for each combination of what it depends on (device, model, dtype, vLLM version, drafter, …).
A file that cannot be read or written, or that is of another shape, is as good as none.
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
    """Where files about something lie unless the deployment says otherwise."""
    return Path(platformdirs.user_cache_dir("vllm-instant")) / name


class PersistentState:
    """The file of one deployment.

    Args:
        folder: where the files lie.
        identity: what the knowledge depends on.
        name: what it is about; stands in the file and in messages.

    """

    def __init__(self, folder: Path, identity: Mapping[str, str], name: str = "costs") -> None:
        self._name = name
        self._identity = dict(sorted(identity.items()))
        digest = hashlib.sha256(json.dumps(self._identity).encode()).hexdigest()[:16]
        self.path = folder / f"{digest}.json"
        self._writing: threading.Thread | None = None

    def load(self) -> dict[str, Any] | None:
        """What was saved for this very deployment, or None."""
        with suppress(OSError, ValueError):
            stored = json.loads(self.path.read_text())
            if isinstance(stored, dict) and stored.get("format") == FORMAT and stored.get("identity") == self._identity:
                knowledge = stored.get(self._name)
                return knowledge if isinstance(knowledge, dict) else None
        return None

    def save(self, knowledge: Mapping[str, Any]) -> None:
        """Write now, replacing the file as a whole; what is being written aside comes first."""
        if self._writing is not None:
            self._writing.join()
        self._write(knowledge)

    def _write(self, knowledge: Mapping[str, Any]) -> None:
        partial = self.path.with_suffix(f".{os.getpid()}.part")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text(json.dumps({"format": FORMAT, "identity": self._identity, self._name: dict(knowledge)}))
            partial.replace(self.path)
        except OSError as error:
            logger.warning("What was learned about %s was not kept: %s", self._name, error)

    def save_aside(self, knowledge: Mapping[str, Any]) -> None:
        """Write in a thread, so that no step waits for a disk; skipped while the last writing still goes on."""
        if self._writing is None or not self._writing.is_alive():
            self._writing = threading.Thread(target=self._write, args=(knowledge,), daemon=True)
            self._writing.start()
