"""Runs a command that must not outlive the process that starts it: ``_orphan_guard.py COMMAND …``.

The starting process holds the write end of a pipe, whose read end is this process's standard input. When it dies, in
whatever way (SIGKILL, the OOM killer, a closed terminal), the pipe ends, and a forked guard ends the process group:
SIGTERM first, SIGKILL after ``GRACE_SECONDS``. A parent-death signal alone (``prctl``) would not do: it belongs to the
*thread* that started a process, and reaches no grandchildren, such as vLLM's engine core.

The command replaces this process (exec), so that process id, exit code and signals are its own. The file is run by its
path with ``python -I -S`` and imports the standard library only, which keeps start and memory small.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import sys
import time

GRACE_SECONDS = 10.0
POLL_SECONDS = 1.0
_PR_SET_PDEATHSIG = 1


def guard(pipe: int, command: int) -> None:
    """End the process group when the pipe ends; returns when the command has ended by itself.

    Args:
        pipe: read end of the pipe.
        command: process id of the command, which leads the process group.

    """
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_IGN)
    with contextlib.suppress(OSError, AttributeError):  # not on Linux: polling finds it, a little later
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    while os.getppid() == command:
        readable, _, _ = select.select([pipe], [], [], POLL_SECONDS)
        if readable and not os.read(pipe, 1):
            break
    else:
        return
    # From here on the guard must outlive the command, whose children may still run.
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, 0)
    end_group(command)


def end_group(group: int) -> None:
    """SIGTERM to all others of our own process group, and SIGKILL to everything that is left after the grace time."""
    os.killpg(group, signal.SIGTERM)
    deadline = time.monotonic() + GRACE_SECONDS
    while time.monotonic() < deadline and set(group_members(group)) - {os.getpid()}:
        time.sleep(0.1)
    os.killpg(group, signal.SIGKILL)


def group_members(group: int) -> list[int]:
    """The living processes of a group, zombies excluded; the leader where there is no /proc."""
    if not os.path.isdir("/proc/self"):
        return [group]
    found = []
    for entry in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError, ValueError), open(f"/proc/{entry}/stat") as stat:
            state, _, its_group = stat.read().rpartition(")")[2].split()[:3]
            if int(its_group) == group and state not in "ZX":
                found.append(int(entry))
    return found


def main() -> None:
    """Fork the guard and become the command."""
    pipe = os.dup(0)  # not inherited by the command
    command = os.getpid()
    if os.fork() == 0:
        code = 0
        try:
            null = os.open(os.devnull, os.O_RDWR)
            os.dup2(null, 0)  # its output must not keep the command's log open
            os.dup2(null, 1)
            os.dup2(null, 2)
            guard(pipe, command)
        except BaseException:
            code = 1
        os._exit(code)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.execvpe(sys.argv[1], sys.argv[1:], os.environ)  # noqa: S606


if __name__ == "__main__":
    main()
