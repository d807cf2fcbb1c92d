"""Servers that are waited for while they make progress, and that leave no process behind."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vllm_instant.tools.measure import servers
from vllm_instant.tools.measure.guarded_process import start_guarded, stop_group
from vllm_instant.tools.measure.servers import Server, ServerError, _LogProgress, running

PRETEND_SERVER = """
import http.server, os, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
open(sys.argv[2], "w").write(f"{os.getpid()} {child.pid}")

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
        self.wfile.write(b'# HELP a\\na_total{x="1"} 2.0\\na_total{x="2"} 3\\nb 1e3\\n')

http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


class Pretend(Server):
    """A server that is no vLLM, with a child process of its own."""

    def __init__(self, folder, code=PRETEND_SERVER):
        super().__init__("model", log=folder / "server.log")
        self.code, self.pids = code, folder / "pids"

    @property
    def command(self):
        return [sys.executable, "-c", self.code, str(self.port), str(self.pids)]

    def process_ids(self):
        return [int(pid) for pid in self.pids.read_text().split()]


def _alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{pid}/stat") as stat:
        return stat.read().split()[2] != "Z"


class TestServers:
    def test_it_waits_answers_and_leaves_no_process(self, tmp_path):
        with Pretend(tmp_path) as server:
            assert server.started_in > 0
            assert server.metrics() == {"a_total": 5.0, "b": 1000.0}
            pids = server.process_ids()
            assert all(_alive(pid) for pid in pids)
        assert not any(_alive(pid) for pid in pids)
        server.stop()

    def test_a_server_that_dies_shows_the_end_of_its_log(self, tmp_path):
        with (
            pytest.raises(ServerError, match="exit code 3") as caught,
            Pretend(tmp_path, "import sys; print('bad luck'); sys.exit(3)"),
        ):
            pass
        assert "bad luck" in str(caught.value)
        assert caught.value.log == "bad luck\n"

    def test_one_failing_server_stops_the_others(self, tmp_path):
        (tmp_path / "a").mkdir()
        (tmp_path / "b").mkdir()
        good, bad = Pretend(tmp_path / "a"), Pretend(tmp_path / "b", "import time; time.sleep(1); raise SystemExit(1)")
        with pytest.raises(ServerError), running(good, bad):
            pass
        assert not any(_alive(pid) for pid in good.process_ids())

    @pytest.mark.parametrize(
        "number",
        [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGKILL],
        ids=["Ctrl-C", "SIGTERM", "closed terminal", "SIGQUIT", "SIGKILL"],
    )
    def test_however_it_is_ended_no_process_is_left(self, tmp_path, number):
        """The signal reaches this process alone; the server and its child end with it."""
        code = f"""
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job may ignore it
sys.path.insert(0, {os.path.dirname(__file__)!r})
from pathlib import Path
from test_servers import Pretend
from vllm_instant.tools.measure.servers import running
with running(Pretend(Path({str(tmp_path)!r}))):
    print("up", flush=True)
    time.sleep(600)
"""
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        assert process.stdout.readline() == b"up\n"
        pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
        process.send_signal(number)
        process.wait(30)
        assert _all_end(pids)


def test_a_guarded_command_is_its_own_process(tmp_path):
    """Process id and exit code are the command's, not the guard's."""
    with (tmp_path / "log").open("wb") as output:
        process = start_guarded(
            [sys.executable, "-c", "import os, sys; print(os.getpid()); sys.exit(7)"], output=output
        )
        assert process.wait(30) == 7
    assert int((tmp_path / "log").read_text()) == process.pid


def test_a_command_that_ignores_sigterm_is_killed(tmp_path):
    code = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(600)"
    )
    with (tmp_path / "log").open("wb") as output:
        process = start_guarded([sys.executable, "-c", code], output=output)
        while "up" not in (tmp_path / "log").read_text():
            assert process.poll() is None
        stop_group(process, seconds=0.2)
    assert process.returncode == -signal.SIGKILL


class TestStarting:
    def test_a_start_may_take_long_while_its_log_grows(self, tmp_path):
        now, log = [0.0], tmp_path / "log"
        progress = _LogProgress(log, 300.0, clock=lambda: now[0])
        for minute in range(30):
            now[0] = 250.0 * minute
            log.write_text("compiling\n" * (minute + 1))
            assert not progress.stalled()
        now[0] += 301
        assert progress.stalled()

    def test_a_start_without_progress_names_the_option(self, tmp_path):
        code = "import time; print('loading weights', flush=True); time.sleep(600)"
        server = Pretend(tmp_path, code)
        server.start_timeout = 1.0
        with pytest.raises(ServerError, match=r"no new line in its log for 1 s \(--start-timeout\)") as caught, server:
            pass
        assert "loading weights" in str(caught.value)

    def test_servers_that_share_cores_start_one_after_the_other(self, tmp_path, monkeypatch):
        for together, expected in ((False, ["launch a", "wait a", "launch b", "wait b"]), (True, None)):
            events = []
            monkeypatch.setattr(servers, "share_cores", lambda count, together=together: not together)
            with running(Recorded("a", events, tmp_path), Recorded("b", events, tmp_path)):
                pass
            assert events == (expected or ["launch a", "launch b", "wait a", "wait b"])

    def test_few_cores_are_shared(self, monkeypatch):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
        assert not servers.share_cores(2)
        assert servers.share_cores(3)

    def test_the_address_is_the_last_word(self, tmp_path):
        server = Server("m", ["--port", "8000", "--host", "::1"], log=tmp_path / "log")
        assert server.command[-4:] == ["--host", "127.0.0.1", "--port", str(server.port)]

    def test_a_proxy_of_the_environment_is_not_for_this_machine(self, tmp_path, monkeypatch):
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, "http://127.0.0.1:9")
        for name in ("NO_PROXY", "no_proxy"):
            monkeypatch.delenv(name, raising=False)
        with Pretend(tmp_path) as server:
            assert server.metrics()["b"] == 1000.0


class Recorded(Server):
    """A server that only notes what is done with it."""

    def __init__(self, name, events, folder):
        super().__init__("m", log=folder / name, name=name)
        self._events = events

    def launch(self):
        self._events.append(f"launch {self.name}")

    def wait(self, seconds=None, say=lambda text: None):
        self._events.append(f"wait {self.name}")


def _all_end(pids):
    """Whether all processes end within the time that a polite stop may take."""
    for _ in range(300):
        if not any(_alive(pid) for pid in pids):
            return True
        time.sleep(0.1)
    return False


def test_ports_are_none_that_the_system_gives_to_connections(tmp_path):
    first, last = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    taken = socket.socket()
    taken.bind(("127.0.0.1", 0))
    ports = {Server("model", log=tmp_path / "log").port for _ in range(50)}
    taken.close()
    assert len(ports) > 40
    if first > servers.PORTS.stop:
        assert not any(first <= port <= last for port in ports)


def test_a_port_that_is_taken_is_not_chosen(monkeypatch, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        monkeypatch.setattr(servers, "PORTS", range(port, port + 51))
        assert port not in {Server("model", log=tmp_path / "log").port for _ in range(20)}
