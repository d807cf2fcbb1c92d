"""Child processes that do not outlive this one, however it ends."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from vllm_instant.tools.measure._orphan_guard import group_members

STOP_SECONDS = 10.0
"""Time after SIGTERM in which a process group can end itself."""
_GUARD = Path(__file__).with_name("_orphan_guard.py")


def start_guarded(
    command: Sequence[str], *, output: IO[Any], environment: Mapping[str, str] | None = None
) -> subprocess.Popen[bytes]:
    """Start a command in a session of its own, ended with its whole process group when this process dies.

    Ctrl-C reaches this process alone, and the group can be stopped as one.

    Args:
        command: its words.
        output: file for its standard output and standard error.
        environment: of the command; this process's by default.

    """
    return subprocess.Popen(
        [sys.executable, "-I", "-S", str(_GUARD), *command],
        stdin=subprocess.PIPE,
        stdout=output,
        stderr=subprocess.STDOUT,
        env=None if environment is None else dict(environment),
        start_new_session=True,
    )


def stop_group(process: subprocess.Popen[bytes], seconds: float = STOP_SECONDS) -> None:
    """End the process group of a guarded command: SIGTERM, and SIGKILL for what still runs ``seconds`` later."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and (process.poll() is None or group_members(process.pid)):
            time.sleep(0.1)
    process.wait()
    if process.stdin is not None:
        process.stdin.close()
