"""Engines and API servers that end with the process that started them, also where that one was killed.

After SIGKILL of ``vllm serve``, which is what the kernel sends when memory is short, vLLM's engine core would keep its
devices for ever, and with ``--api-server-count`` its API servers their port, so that no new server could start.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import select
import signal
import threading
import time
from typing import Any

from vllm_instant.patches.compat import HasSignature, VllmPatch
from vllm_instant.patches.names import ENGINE_CORE

logger = logging.getLogger("vllm.instant")

POLL_SECONDS = 1.0
GRACE_SECONDS = 5.0
"""Time to end by SIGTERM, in which policies save what they learned."""
_THREAD = "instant-parent"


def watch_parent() -> threading.Thread | None:
    """End this process when the one that started it by ``multiprocessing`` is gone; None where there is none."""
    parent = multiprocessing.parent_process()
    if parent is None or parent.pid is None or any(one.name == _THREAD for one in threading.enumerate()):
        return None
    thread = threading.Thread(target=_end_with, args=(parent.pid,), name=_THREAD, daemon=True)
    thread.start()
    return thread


def _end_with(parent: int) -> None:
    _wait_for_end(parent)
    logger.error("The process that started this one is gone: ending")
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE_SECONDS)
    os.kill(os.getpid(), signal.SIGKILL)


def _wait_for_end(parent: int) -> None:
    # A signal on the parent's death (prctl) would come when the *thread* ends that started this process.
    try:
        descriptor = os.pidfd_open(parent)
    except (AttributeError, OSError):  # not on Linux, or not allowed, or gone already
        while os.getppid() == parent:
            time.sleep(POLL_SECONDS)
        return
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    while os.getppid() == parent and not poll.poll(1000 * POLL_SECONDS):
        pass
    os.close(descriptor)


def _run_busy_loop(run: Any, core: Any) -> None:
    watch_parent()
    run()


_FILE = "v1/engine/core.py"

PATCH = VllmPatch(
    name="orphaned_processes",
    purpose="no engine is left where vLLM's front end was killed",
    requirements=(
        HasSignature(_FILE, "EngineCoreProc.run_busy_loop", ("self",)),
        HasSignature(_FILE, "DPEngineCoreProc.run_busy_loop", ("self",)),
    ),
    optional=True,
    wraps={
        f"{ENGINE_CORE}:EngineCoreProc.run_busy_loop": _run_busy_loop,
        f"{ENGINE_CORE}:DPEngineCoreProc.run_busy_loop": _run_busy_loop,
    },
)
