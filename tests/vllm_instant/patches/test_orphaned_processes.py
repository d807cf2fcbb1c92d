"""A process ends with the one that started it, also where that one was killed, and not with one of its threads."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
from patch_harness import wrap

from vllm_instant.patches import orphaned_processes
from vllm_instant.patches.names import ENGINE_CORE

PARENT = """
import multiprocessing, signal, sys, threading, time

def serve(deaf):
    from vllm_instant.patches import orphaned_processes
    orphaned_processes.GRACE_SECONDS = 1.0
    if deaf:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    assert orphaned_processes.watch_parent() is not None
    assert orphaned_processes.watch_parent() is None
    print("up", flush=True)
    time.sleep(600)

if __name__ == "__main__":
    process = multiprocessing.get_context(sys.argv[1]).Process(target=serve, args=(sys.argv[2] == "deaf",))
    starter = threading.Thread(target=process.start)
    starter.start()
    starter.join()
    print(process.pid, flush=True)
    time.sleep(600)
"""


@pytest.fixture
def start(tmp_path):
    """Start a parent with one child; returns the parent and the child."""
    started = []

    def run(method, hears="hears"):
        script = tmp_path / "parent.py"
        script.write_text(PARENT)
        command = [sys.executable, str(script), method, hears]
        parent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        words = {parent.stdout.readline().strip(), parent.stdout.readline().strip()}
        child = psutil.Process(int((words - {"up"}).pop()))
        started.extend([psutil.Process(parent.pid), child])
        return parent, child

    yield run
    for process in started:
        if process.is_running():
            process.kill()


def _ends(process, seconds):
    deadline = time.monotonic() + seconds
    while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_a_process_ends_with_a_parent_that_was_killed(start, method):
    parent, child = start(method)
    # The thread that started it is gone already.
    assert not _ends(child, 1.5)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    assert _ends(child, 8.0)


def test_one_that_does_not_hear_is_killed(start):
    parent, child = start("spawn", "deaf")
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    assert not _ends(child, 0.7)
    assert _ends(child, 8.0)


@pytest.mark.parametrize("error", [AttributeError, OSError])
def test_without_a_descriptor_of_the_parent_it_is_looked_for(monkeypatch, error):
    def refuse(pid):
        raise error

    monkeypatch.setattr(orphaned_processes.os, "pidfd_open", refuse, raising=False)
    parents = iter([7, 7, 1])
    monkeypatch.setattr(orphaned_processes.os, "getppid", lambda: next(parents))
    monkeypatch.setattr(orphaned_processes, "POLL_SECONDS", 0.01)
    orphaned_processes._wait_for_end(7)
    assert next(parents, None) is None


def test_an_engine_in_the_users_own_process_has_no_parent_to_watch():
    assert orphaned_processes.watch_parent() is None


@pytest.mark.parametrize("name", ["EngineCoreProc", "DPEngineCoreProc"])
def test_an_engine_core_watches_while_it_runs(monkeypatch, name):
    happened = []
    monkeypatch.setattr(orphaned_processes, "watch_parent", lambda: happened.append("watched"))
    core = type(name, (), {"run_busy_loop": lambda self: happened.append("ran")})
    module = wrap(orphaned_processes.PATCH, ENGINE_CORE, **{name: core})
    getattr(module, name)().run_busy_loop()
    assert happened == ["watched", "ran"]
