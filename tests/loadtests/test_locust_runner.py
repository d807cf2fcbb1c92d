"""Whole runs: Locust in its own process against mock servers."""

from __future__ import annotations

import itertools
import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from mock_servers import RunningMock, serving

from vllm_instant_loadtests import schedule
from vllm_instant_loadtests.analysis import analyse_server
from vllm_instant_loadtests.capacity import CapacityPlan, analyse_capacity
from vllm_instant_loadtests.mock import MockPace
from vllm_instant_loadtests.run_recorder import RecordedRun
from vllm_instant_loadtests.scenario import load

Locust = Callable[..., subprocess.CompletedProcess[str]]
SCENARIO = """
title = "All sorts"
seconds = 4

[[traffic]]
kind = "chat"
prompts = "creative"
rate = 4.0
max_tokens = [10, 20]

[[traffic]]
kind = "leaving"
prompts = "code"
route = "completions"
rate = 2.0
max_tokens = 60
leave_share = 1.0
leave_after_tokens = [3, 6]

[[traffic]]
kind = "typist"
prompts = "creative"
route = "typist"
rate = 1.0
characters_per_second = 150
max_tokens = 12

[alternation]
seconds = 2
"""


class Played:
    """Two servers in turn: a quick one, and one that serves one request at a time."""

    def __init__(self, run: RecordedRun, quick: RunningMock, slow: RunningMock, truth: Path, output: str) -> None:
        self.run, self.quick, self.slow, self.output = run, quick, slow, output
        self.planned = schedule.scheduled_requests(load(truth.parent / "all.toml"), "0")
        self.sent = {line["id"]: line["sent"] for line in map(json.loads, truth.read_text().splitlines())}


@pytest.fixture(scope="module")
def played(locust: Locust, tmp_path_factory: pytest.TempPathFactory) -> Played:
    folder = tmp_path_factory.mktemp("played")
    (folder / "all.toml").write_text(SCENARIO)
    with (
        serving(MockPace(first_ms=20, step_ms=10, tokens_per_step=2), folder / "truth.jsonl") as quick,
        serving(MockPace(first_ms=150, step_ms=10, tokens_per_step=2, slots=1)) as slow,
    ):
        words = ["--scenario", str(folder / "all.toml"), "--output", str(folder / "run")]
        done = locust("--servers", f"quick={quick.url} slow={slow.url}", *words)
        assert done.returncode == 0, done.stderr
    return Played(RecordedRun.read(folder / "run"), quick, slow, folder / "truth.jsonl", done.stdout + done.stderr)


def test_both_servers_get_the_same_requests_at_the_same_moments(played: Played) -> None:
    due = {}
    for server in ("quick", "slow"):
        begins = {s["number"]: s["began"] - s["from"] for s in played.run.about["segments"] if s["server"] == server}
        requests = played.run.of(server).requests
        due[server] = {r.number: (r.kind, r.due - begins[r.segment or 0]) for r in requests}
    assert due["quick"].keys() == due["slow"].keys()
    assert len(due["quick"]) > 15
    for one in played.planned:
        expected = (one.kind, pytest.approx(one.at + one.typing_seconds, abs=1e-3))
        assert due["quick"][one.number] == expected
        assert due["slow"][one.number] == expected
    asked = [sorted(json.dumps(b, sort_keys=True) for b in s.mock.asked) for s in (played.quick, played.slow)]
    assert asked[0] == asked[1]


def test_the_servers_take_turns(played: Played) -> None:
    segments = played.run.about["segments"]
    assert sorted((s["number"], s["server"]) for s in segments) == [
        (number, server) for number in (0, 1) for server in ("quick", "slow")
    ]
    for one, other in itertools.pairwise(segments):
        assert one["ended"] < other["began"]
    for request in played.run.requests:
        segment = next(s for s in segments if (s["number"], s["server"]) == (request.segment, request.server))
        assert segment["began"] <= request.due <= segment["ended"]
        assert request.ended <= segment["ended"]


@pytest.mark.perf
def test_requests_are_sent_on_time_while_a_slow_server_queues_them(played: Played) -> None:
    slow = [r for r in played.run.of("slow").requests if r.route != "typist"]
    assert max(r.ttft for r in slow) > 0.6  # they queue …
    assert max(r.sent - r.due for r in slow) < 0.15  # … and are sent when they are due all the same


def test_every_token_is_counted_as_the_server_sent_it_and_none_is_early(played: Played) -> None:
    clock = played.run.about["clock"]
    errors = []
    for request in played.run.of("quick").requests:
        sent = {tokens: when - clock for when, tokens in played.sent[request.id]}
        assert {tokens for _, tokens in request.arrivals} <= sent.keys()
        if not request.left:
            assert request.tokens == max(sent)
        errors += [when - sent[tokens] for when, tokens in request.arrivals]
    assert min(errors) > -0.002


@pytest.mark.perf
def test_arrivals_are_recorded_within_ten_milliseconds(played: Played) -> None:
    clock = played.run.about["clock"]
    errors = []
    for request in played.run.of("quick").requests:
        sent = {tokens: when - clock for when, tokens in played.sent[request.id]}
        errors += [when - sent[tokens] for when, tokens in request.arrivals]
    assert np.median(errors) < 0.01


def test_clients_leave_and_that_is_no_failure(played: Played) -> None:
    leaving = [r for r in played.run.requests if r.kind == "leaving"]
    assert all(r.left and r.error is None and 3 <= r.tokens < 40 for r in leaving)
    assert played.quick.mock.aborted > 0
    assert not any(r.left or r.error for r in played.run.requests if r.kind != "leaving")


def test_typists_commit_when_they_are_due(played: Played) -> None:
    typists = [r for r in played.run.of("quick").requests if r.kind == "typist"]
    assert typists
    late = [r.sent - r.due for r in typists]
    assert min(late) > -0.001
    assert np.median(late) < 0.2


def test_metrics_of_servers_and_load_generator_are_recorded(played: Played) -> None:
    for server in ("quick", "slow"):
        samples = played.run.of(server).samples
        assert len(samples) > 8
        assert samples[-1].values["vllm:generation_tokens_total"] > 0
        assert max(np.diff([s.at for s in samples])) < 2
    assert played.run.client
    assert all(0 <= reading.cpu < 1.2 for reading in played.run.client)


def test_locust_shows_each_metric_in_a_row_of_its_own(played: Played) -> None:
    for row in ("TTFT", "ITL", "stall", "tokens/s", "E2E"):
        assert any(line.startswith(row) and "quick: chat" in line for line in played.output.splitlines())
    total = next(line for line in played.output.splitlines() if "Aggregated" in line)
    kept = [r for r in played.run.requests if not r.left]
    assert int(total.split()[1]) == len(kept)


def test_workers_lose_no_record_and_keep_sessions_together(locust: Locust, tmp_path: Path) -> None:
    (tmp_path / "s.toml").write_text(
        'title = "t"\nseconds = 3\n[[traffic]]\nkind = "a"\nprompts = "code"\nrate = 12.0\nmax_tokens = 20\n'
        '[[traffic]]\nkind = "talk"\nprompts = "creative"\nrate = [[0, 4], [1, 4], [1, 0]]\nmax_tokens = 20\n'
        "[traffic.session]\nturns = 3\nthink_seconds = [0.1, 0.2]\n"
    )
    pace = MockPace(first_ms=20, step_ms=10, thinking_tokens=8, accepted_share=0.5)
    with serving(pace) as server:
        words = ["--scenario", str(tmp_path / "s.toml"), "--output", str(tmp_path / "run"), "--processes", "2"]
        done = locust("--host", server.url, *words)
        assert done.returncode == 0, done.stderr
        asked, known_prefixes = server.mock.asked, server.mock.prefix_hits / server.mock.prefix_queries
    run = RecordedRun.read(tmp_path / "run")
    assert run.about["finished"]
    assert len(run.requests) == len(asked) - 2  # the warm-up is not recorded
    assert sorted(r.number or 0 for r in run.requests) == list(range(len(run.requests)))
    assert all(r.error is None and r.tokens == 20 and r.accepted == 10 for r in run.requests)
    assert all(r.thinking_tokens == 8 and r.answer_ttft >= r.ttft for r in run.requests)
    assert {reading.process for reading in run.client} == {0, 1}
    by_number = {r.number: r for r in run.requests}
    later = [r for r in run.requests if r.turn]
    assert len(later) >= 2
    for request in later:
        assert 0.0999 <= request.due - by_number[(request.number or 0) - 1].ended <= 0.2001
    talks = [body["messages"] for body in asked if len(body.get("messages", ())) == 5]
    assert talks
    assert all(messages[1] == {"role": "assistant", "content": " word" * 12} for messages in talks)
    tables = analyse_server(run, "server").tables
    assert tables is not None
    assert tables.sessions is not None
    assert (tables.sessions.turns, [group.name for group in tables.turns]) == (3, ["1", "2", "3"])
    assert known_prefixes > 0.2


def test_a_run_that_cannot_be_made_says_why(locust: Locust, tmp_path: Path) -> None:
    done = locust("--host", "http://127.0.0.1:9", "--output", str(tmp_path / "run"))
    assert done.returncode == 2
    assert "http://127.0.0.1:9 is no running vLLM server" in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_capacity_search_records_its_probes_and_continues(locust: Locust, tmp_path: Path) -> None:
    (tmp_path / "s.toml").write_text(
        'title = "t"\nseconds = 3\n[[traffic]]\nkind = "a"\nprompts = "creative"\nrate = 10.0\nmax_tokens = 10\n'
    )
    plan = CapacityPlan(["ttft_p95_ms=300"], probe_seconds=1.2, rates=[5.0, 400.0])
    words = ["--scenario", str(tmp_path / "s.toml"), "--output", str(tmp_path / "run"), "--capacity", plan.text()]
    with serving(MockPace(first_ms=10, step_ms=10, slots=2)) as slow, serving(MockPace(first_ms=10)) as fast:
        servers = ["--servers", f"slow={slow.url} fast={fast.url}"]
        done = locust(*servers, *words, "--max-seconds", "0.5")
        assert done.returncode == 0, done.stderr
        run = RecordedRun.read(tmp_path / "run")
        assert (len(run.about["segments"]), run.about["finished"]) == (2, False)
        done = locust(*servers, *words)
        assert done.returncode == 0, done.stderr
    run = RecordedRun.read(tmp_path / "run")
    assert run.about["finished"]
    found = {server.server: server for server in analyse_capacity(run).servers}
    assert [probe.rate for probe in found["slow"].probes] == [5.0, 400.0]
    held, missed = found["slow"].probes
    assert held.counts["ttft_p95_ms"][0] == held.requests > 0
    assert missed.stopped
    assert missed.counts["attain"][0] < 0.5 * missed.requests
    times = [(segment["began"], segment["ended"]) for segment in run.about["segments"]]
    assert all(one[1] < other[0] for one, other in itertools.pairwise(times))


def test_users_of_a_closed_loop_hold_sessions_one_after_the_other(locust: Locust, tmp_path: Path) -> None:
    (tmp_path / "s.toml").write_text(
        'title = "t"\nseconds = 20\n[[traffic]]\nkind = "talk"\nprompts = "creative"\nrate = 2.0\nmax_tokens = 10\n'
        "[traffic.session]\nturns = 2\nthink_seconds = 0.1\n"
    )
    with serving(MockPace(first_ms=20, step_ms=10)) as server:
        words = ["--scenario", str(tmp_path / "s.toml"), "--output", str(tmp_path / "run"), "--closed-loop"]
        users = ["--users", "3", "--spawn-rate", "10", "--duration", "2.5", "--processes", "2"]
        done = locust("--host", server.url, *words, *users)
        assert done.returncode == 0, done.stderr
    run = RecordedRun.read(tmp_path / "run")
    assert run.about["finished"]
    assert len(run.requests) > 6
    assert {(r.server, r.error, r.tokens) for r in run.requests} == {("server", None, 10)}
    assert {(r.number, r.turn) for r in run.requests} == {(None, 0), (None, 1)}  # none of the scenario's own arrivals
    end = run.about["segments"][0]["ended"]
    assert all(0 <= r.due <= r.sent + 0.001 <= r.arrivals[0][0] <= r.ended <= end for r in run.requests)
    at_once = max(sum(o.due <= r.due < o.ended - 0.02 for o in run.requests) for r in run.requests)
    assert at_once <= 3
    assert any(line.startswith("E2E") and "talk" in line for line in (done.stdout + done.stderr).splitlines())
