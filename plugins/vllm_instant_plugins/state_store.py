"""What was learned about a deployment, stored on disk for its next start.

One small JSON file per combination of what it depends on (device, model, dtype, vLLM version, drafter, …). A file that
cannot be read, has another format, is too large, or holds numbers that nothing measures is treated as missing.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import stat
import tempfile
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from vllm_instant.deployment.user_cache import user_cache

logger = logging.getLogger("vllm.instant")

FORMAT = 1
MAX_BYTES = 16 << 20
"""Maximum size of a file."""
MAX_NUMBER = 1e15
"""Maximum absolute value of a number: far more than any time, count or rate, and safe in sums and squares."""


def default_folder(name: str) -> Path:
    """The folder of one kind of state unless the deployment names another one."""
    return user_cache(name)


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
        # Whatever the file holds, the server must start: JSON that is nested too deeply raises RecursionError.
        with suppress(Exception):
            stored = self._read()
            if isinstance(stored, dict) and stored.get("format") == FORMAT and stored.get("identity") == self._identity:
                state = stored.get(self._name)
                return state if isinstance(state, dict) else None
        return None

    def _read(self) -> Any:
        # Opened without waiting, in case it is a FIFO.
        descriptor = os.open(self.path, os.O_RDONLY | os.O_NONBLOCK)
        with open(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise ValueError("not a regular file")
            text = file.read(MAX_BYTES + 1)
        if len(text) > MAX_BYTES:
            raise ValueError("too large")
        return json.loads(text, parse_float=_plausible_float, parse_int=_plausible_int, parse_constant=_refused)

    def save(self, state: Mapping[str, Any]) -> None:
        """Write now, replacing the file as a whole, after any write in the background has ended."""
        if self._writing is not None:
            self._writing.join()
        self._write(state)

    def _write(self, state: Mapping[str, Any]) -> None:
        partial: Path | None = None
        try:
            text = json.dumps({"format": FORMAT, "identity": self._identity, self._name: dict(state)}, allow_nan=False)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # A name that cannot be foreseen: in a shared folder another user could put a link there.
            descriptor, name = tempfile.mkstemp(prefix=f"{self.path.stem}.", suffix=".part", dir=self.path.parent)
            partial = Path(name)
            with open(descriptor, "w") as file:
                file.write(text)
            partial.replace(self.path)
        except (OSError, ValueError, TypeError) as error:
            logger.warning("What was learned about %s was not kept: %s", self._name, error)
            if partial is not None:
                with suppress(OSError):
                    partial.unlink()

    def save_in_background(self, state: Mapping[str, Any]) -> None:
        """Write in a thread, so that no step waits for a disk; skipped while the last write is still running."""
        if self._writing is None or not self._writing.is_alive():
            self._writing = threading.Thread(target=self._write, args=(state,), daemon=True)
            self._writing.start()


def _plausible_float(text: str) -> float:
    return float(_plausible(float(text)))


def _plausible_int(text: str) -> int:
    # Hashes of contexts are whole numbers of 64 bits.
    if len(text) > 20 or not abs(int(text)) < 2**64:
        raise ValueError("a number with too many digits")
    return int(text)


def _plausible(number: float) -> float:
    if not abs(number) <= MAX_NUMBER:
        raise ValueError("a number that nothing measures")
    return number


def _refused(name: str) -> Any:
    raise ValueError(f"{name} is no number")
