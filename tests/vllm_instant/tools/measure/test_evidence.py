"""Intervals, streams counted by token, servers that leave no process behind."""

import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_instant.tools.measure.servers import Server, ServerError, running
from vllm_instant.tools.measure.statistics import median_interval, ratio_interval


class TestIntervals:
    @given(st.lists(st.floats(0.1, 1e3), min_size=1, max_size=30))
    def test_the_median_lies_between_the_bounds(self, values):
        interval = median_interval(values, draws=200)
        assert min(values) <= interval.low <= interval.high <= max(values)
        assert interval.median == pytest.approx(np.median(values))

    def test_coverage_is_near_what_is_claimed(self):
        generator = np.random.default_rng(0)
        hits = 0
        for _ in range(200):
            interval = median_interval(generator.normal(5, 1, 40), draws=400)
            hits += interval.low <= 5 <= interval.high
        assert 0.88 <= hits / 200 <= 0.995

    def test_drift_between_rounds_cancels_in_ratios(self):
        drift = np.linspace(1, 10, 20)
        interval = ratio_interval(1.1 * drift, drift)
        assert (interval.low, interval.high) == pytest.approx((1.1, 1.1))

    def test_arms_of_different_length(self):
        with pytest.raises(ValueError, match="2 rounds of one arm, 1 of the other"):
            ratio_interval([1, 2], [1])

    def test_no_values(self):
        with pytest.raises(ValueError, match="no values"):
            median_interval([])


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
    def test_it_waits_answers_and_leaves_nothing(self, tmp_path):
        with Pretend(tmp_path) as server:
            assert server.started_in > 0
            assert server.metrics() == {"a_total": 5.0, "b": 1000.0}
            pids = server.process_ids()
            assert all(_alive(pid) for pid in pids)
        assert not any(_alive(pid) for pid in pids)
        server.stop()

    def test_a_server_that_dies_says_its_last_words(self, tmp_path):
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

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "kill"])
    def test_interrupting_leaves_nothing(self, tmp_path, number):
        """The signal reaches us alone; the servers go with us."""
        code = f"""
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a runner in the background may have us ignore it
sys.path.insert(0, {os.path.dirname(__file__)!r})
from pathlib import Path
from test_evidence import Pretend
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
        assert not any(_alive(pid) for pid in pids)
