"""Requests as time series."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_instant_loadtests import windows
from vllm_instant_loadtests.run_recorder import RecordedRequest
from vllm_instant_loadtests.windows import ITL, PACE, STALL, TTFT, LatencySamples


def _request(due, arrivals, error=None, left=False, ended=None, segment=None):
    last = arrivals[-1][0] if arrivals else due
    return RecordedRequest(
        "r", "s", "k", "chat", due, due, arrivals, ended or last, error=error, left=left, segment=segment
    )


def _steady(due, tokens, gap, first=0.1):
    return _request(due, [(due + first + gap * i, i + 1) for i in range(tokens)])


def test_tokens_that_arrive_together_share_the_gap():
    entries = windows.latency_samples([_request(0.0, [(0.5, 1), (0.9, 5)])])
    assert entries[ITL].values == pytest.approx([0.1])
    assert entries[ITL].weights == pytest.approx([4])
    assert entries[STALL].values == pytest.approx([0.4])


def test_ttft_counts_from_when_a_request_was_due_and_to_the_end_of_one_without_tokens():
    late = RecordedRequest("r", "s", "k", "chat", due=1.0, sent=1.4, arrivals=[(1.5, 1)], ended=1.5)
    failed = _request(2.0, [], error="HTTP 500", ended=2.75)
    gone = _request(3.0, [], left=True, ended=9.0)
    assert windows.latency_samples([late, failed, gone])[TTFT].values == pytest.approx([0.5, 0.75])


def test_the_end_of_a_failed_answer_is_a_stall_and_no_time_between_tokens():
    entries = windows.latency_samples([_request(0.0, [(0.1, 1), (0.2, 2)], error="cut off", ended=5.2)])
    assert entries[STALL].values.max() == pytest.approx(5.0)
    assert entries[ITL].values.max() == pytest.approx(0.1)


def test_a_window_in_which_nothing_arrived_shows_the_wait():
    pause = [(10.0 + 0.05 * i, i + 1) for i in range(100)]
    pause = [(when + (3.0 if when > 12.5 else 0.0), tokens) for when, tokens in pause]
    requests = [_steady(0.05 * i, 100, 0.1) for i in range(5)] + [_request(9.9, pause)]
    series = windows.windowed_series(STALL, windows.latency_samples(requests)[STALL], [(0.0, 18.0)])
    inside = (series.at > 13.0) & (series.at < 15.0)
    assert inside.sum() == 3
    assert series.values[inside] == pytest.approx(3.05, abs=0.06)
    assert np.nanmax(series.values[series.at < 11.5]) == pytest.approx(0.1)


def test_time_outside_of_a_servers_segments_is_ignored():
    requests = [_steady(float(t), 20, 0.05) for t in (*range(20), *range(40, 60))]
    segments = [
        {"server": "s", "began": 0.0, "ended": 20.0, "number": 0},
        {"server": "other", "began": 20.0, "ended": 40.0, "number": 0},
        {"server": "s", "began": 40.0, "ended": 62.0, "number": 1},
    ]
    parts = windows.loaded_segments(segments, "s", requests)
    series = windows.windowed_series(PACE, windows.latency_samples(requests)[PACE], parts)
    assert parts == [(0.0, 19.0), (40.0, 59.0)]
    assert set(series.segment) == {0, 1}
    assert not ((series.at > 19.0) & (series.at < 42.0)).any()


def test_too_little_data_is_said_instead_of_judged():
    few = [_steady(float(t), 5, 0.05) for t in range(0, 40, 4)]
    entries = windows.latency_samples(few)
    assert windows.windowed_series(TTFT, entries[TTFT], [(0.0, 60.0)]).too_little.endswith("are needed for a baseline")
    assert windows.windowed_series(ITL, entries[ITL], [(0.0, 40.0)]).too_little


@given(
    st.lists(st.tuples(st.floats(0.001, 10.0), st.integers(1, 9)), min_size=1, max_size=40),
    st.sampled_from([0.5, 0.9, 0.99]),
)
def test_a_quantile_by_tokens_is_that_of_the_tokens_one_by_one(gaps, share):
    values, weights = np.array(gaps).T
    entries = LatencySamples(values, values, values, weights, np.zeros(len(values)))
    one_by_one = np.sort(np.repeat(values, weights.astype(int)))
    found = entries.quantile(share)
    assert (one_by_one <= found).mean() >= share - 1e-9
    assert (one_by_one < found).mean() <= share + 1e-9


@given(st.floats(0.0, 500.0))
def test_series_move_with_the_run(shift):
    requests = [_steady(0.7 * i, 30, 0.05) for i in range(40)]
    moved = [_steady(0.7 * i + shift, 30, 0.05) for i in range(40)]
    for metric in (PACE, STALL):
        one = windows.windowed_series(metric, windows.latency_samples(requests)[metric], [(0.0, 28.0)])
        other = windows.windowed_series(metric, windows.latency_samples(moved)[metric], [(shift, 28.0 + shift)])
        assert other.at - shift == pytest.approx(one.at)
        assert np.nanmedian(other.values) == pytest.approx(np.nanmedian(one.values))
