"""Spikes: found when they are there, and not otherwise."""

import gzip
import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from vllm_instant_loadtests import causes, spikes, windows
from vllm_instant_loadtests.analysis import analyse_run
from vllm_instant_loadtests.run_recorder import Disturbance, RecordedRequest, RecordedRun, request
from vllm_instant_loadtests.simulated import SERVER, SimulatedEngine, SimulatedTraffic, simulate_run
from vllm_instant_loadtests.windows import ITL, WindowedSeries

RECORDED = sorted((Path(__file__).parent / "recorded").glob("*.json.gz"))
BLOCK = 6.0
TEN_STREAMS = SimulatedTraffic(rate=4.0)


def _spikes(run):
    return analyse_run(run).spikes


def _overlapping(run, event):
    return [spike for spike in _spikes(run) if spike.began < event.ended and spike.ended > event.began]


def _recorded(path):
    return [request(plain) for plain in json.loads(gzip.decompress(path.read_bytes()))]


def _moved(one: RecordedRequest, seconds: float) -> RecordedRequest:
    arrivals = [(when + seconds, tokens) for when, tokens in one.arrivals]
    return replace(
        one, due=one.due + seconds, sent=one.sent + seconds, ended=one.ended + seconds, arrivals=arrivals, segment=0
    )


def _replayed(recordings, seed):
    """A no-change run of 60 s, put together from blocks of recorded ones."""
    choose = random.Random(seed)
    requests = []
    for block in range(10):
        source = choose.choice(recordings)
        last = max(one.due for one in source)
        begin = choose.uniform(2.0, last - BLOCK)
        inside = [one for one in source if begin <= one.due < begin + BLOCK]
        requests += [_moved(one, block * BLOCK - begin) for one in inside]
    return RecordedRun({"servers": [{"name": requests[0].server}]}, requests)


def test_a_rise_of_sixty_percent_for_five_seconds_is_found_among_ten_streams():
    event = Disturbance(SERVER, causes.UNKNOWN, 30.0, 35.0)
    hits = 0
    for seed in range(20):
        found = _overlapping(simulate_run(60, [event], slower=1.6, load=TEN_STREAMS, seed=seed), event)
        hits += bool(found)
        for spike in found:
            assert 26.0 < spike.began < spike.ended < 39.0
            assert all(rise.ratio.low <= rise.ratio.mean <= rise.ratio.high for rise in spike.rises)
    assert hits >= 18


def test_no_spike_in_simulated_runs_without_a_change():
    alarms = sum(
        bool(
            _spikes(
                simulate_run(
                    60,
                    load=SimulatedTraffic(rate=1.5 + seed % 3),
                    engine=SimulatedEngine(draft_tokens=5 * (seed % 2)),
                    seed=seed,
                )
            )
        )
        for seed in range(60)
    )
    assert alarms <= 3


@pytest.mark.parametrize("path", RECORDED, ids=lambda path: path.name.split(".")[0])
def test_recordings_of_real_servers_are_there(path):
    assert len(_recorded(path)) > 30


@pytest.mark.parametrize(
    ("life", "share"),
    [
        ("few-seats", 0.05),
        # Three of ten runs had a stretch of texts that the draft model could not predict, which remain visible.
        ("drafting", 0.15),
    ],
)
def test_no_spike_in_runs_recorded_without_a_change(life, share):
    """Blocks of real runs in other orders."""
    recordings = [_recorded(path) for path in RECORDED if path.name.startswith(life)]
    assert len(recordings) == 3
    alarms = sum(bool(_spikes(_replayed(recordings, f"{life}{seed}"))) for seed in range(30))
    assert alarms <= share * 30


def test_a_slow_half_of_a_run_is_a_spike_of_the_fast_half():
    event = Disturbance(SERVER, causes.ACCEPTANCE, 30.0, 60.0)
    run = simulate_run(60, [event], engine=SimulatedEngine(draft_tokens=5), load=SimulatedTraffic(rate=1.5), seed=3)
    found = _overlapping(run, event)
    assert sum(spike.ended - spike.began for spike in found) > 20
    assert {spike.cause for spike in found} == {causes.ACCEPTANCE}


def test_a_significant_rise_of_a_tenth_is_no_spike():
    event = Disturbance(SERVER, causes.UNKNOWN, 25.0, 40.0)
    assert not _overlapping(simulate_run(60, [event], slower=1.1, load=TEN_STREAMS, seed=1), event)


def test_more_metrics_or_rarer_alarms_need_more_evidence():
    at = np.arange(0.0, 60.0, windows.HOP)
    noise = np.random.default_rng(0).normal(0.0, 0.08, len(at))
    noise[60:70] += 1.0
    series = WindowedSeries(ITL, at, 0.03 * np.exp(noise), np.zeros(len(at), int))
    [(one, p)], quiet = spikes.significant(series, 1)
    [(_, p_of_four)], _ = spikes.significant(series, 4)
    assert (one.first, one.last) == (60, 69)
    assert not quiet[59:71].any()
    assert quiet[:59].all()
    assert p_of_four == pytest.approx(4 * p)
    assert p_of_four < 0.05
    assert spikes.significant(series, 4, alpha=p)[0] == []


def test_windows_of_two_segments_are_not_neighbours():
    excess = np.array([0.0, 1.0, 1.0, 1.0, 0.0])
    together = spikes.candidates(excess, np.zeros(5, int), 0.3)
    apart = spikes.candidates(excess, np.array([0, 0, 1, 1, 1]), 0.3)
    assert [(one.first, one.last) for one in together] == [(1, 3)]
    assert [(one.first, one.last) for one in apart] == [(1, 1), (2, 3)]


def test_rises_of_several_metrics_at_the_same_time_are_one_spike():
    event = Disturbance(SERVER, causes.STOPPED, 30.0, 32.0)
    run = simulate_run(60, [event], load=TEN_STREAMS, seed=5)
    [spike] = _overlapping(run, event)
    assert len(spike.rises) > 1
    assert len({rise.metric for rise in spike.rises}) == len(spike.rises)


def test_a_short_run_is_not_judged():
    analysis = analyse_run(simulate_run(10, load=TEN_STREAMS, seed=1))
    [server] = analysis.servers
    assert set(server.too_little) == set(windows.METRICS)
    assert server.reached()["spikes"] is None
