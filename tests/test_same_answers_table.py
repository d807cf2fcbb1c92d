"""The table behind ``benchmarks/same_answers.py``: its size, what it covers, and how answers are compared."""

from itertools import combinations

import pytest
import request_features
import server_flags
from feature_answers import difference, joined, plain

pytestmark = pytest.mark.unit


def _pairs(factors):
    """All pairs of levels of different factors, each as ``factor: level``."""
    levels = [(factor, f"{factor}: {level}") for factor, found in factors.items() for level in found]
    return {frozenset((a, b)) for (one, a), (two, b) in combinations(levels, 2) if one != two}


def test_it_has_more_than_forty_flags_and_forty_request_options():
    flags, features = server_flags.single_rows(), request_features.single_features()
    assert len(flags) > 40 < len(features)
    for names in ([row.name for row in flags], [feature.name for feature in features]):
        assert len(names) == len(set(names))


def test_any_two_flags_and_choices_of_slots_occur_in_one_server():
    factors = server_flags.FLAGS | server_flags.OURS
    default = {factor: f"{factor}: {next(iter(levels))}" for factor, levels in factors.items()}
    covered = set()
    for row in server_flags.pair_rows():
        named = {name.split(": ")[0]: name for name in row.name.split(", ")}
        covered |= {frozenset(pair) for pair in combinations((default | named).values(), 2)}
    assert _pairs(factors) <= covered


def test_any_two_options_occur_in_one_request():
    factors = request_features.FACTORS
    bodies = [feature.body.items() for feature in request_features.pairs_of_features()]

    def together(one, two):
        return any(one.items() <= body and two.items() <= body for body in bodies)

    missing = [
        (a, b)
        for (_, first), (_, second) in combinations(factors.items(), 2)
        for a, one in first.items()
        for b, two in second.items()
        if not together(dict(one), dict(two))
    ]
    assert missing == []


def test_a_streamed_answer_is_put_together():
    call = {"index": 0, "function": {"name": "add", "arguments": '{"a"'}}
    more = {"index": 0, "function": {"arguments": ": 1}"}}
    events = [
        {"choices": [{"index": 0, "delta": {"content": "a", "tool_calls": [call]}}]},
        {"choices": [{"index": 0, "delta": {"content": "b", "tool_calls": [more]}, "finish_reason": "stop"}]},
        {"choices": [], "usage": {"completion_tokens": 2}},
    ]
    found = joined(events)
    assert found["choices"]["0"]["text"] == "ab"
    assert found["choices"]["0"]["tools"]["0"] == {"name": "add", "arguments": '{"a": 1}'}
    assert found["choices"]["0"]["finish_reason"] == "stop"
    assert found["usage"] == {"completion_tokens": 2}


def test_tokens_that_are_not_allowed_are_not_compared():
    masked = {"a": 0.0, "b": -9999.0}
    chat = [{"token": "a", "logprob": 0.0}, {"token": "b", "logprob": -9999.0}]
    found = plain({"id": "x", "top_logprobs": [masked, chat]})
    assert found == {"top_logprobs": [{"a": 0.0}, chat[:1]]}


def test_requests_that_end_vllms_own_engine_are_left_out_of_their_rows_alone():
    features = {feature.name: feature for feature in request_features.single_features()}
    rows = server_flags.row_of("adapters: lora"), server_flags.Row("no flag", ())
    assert [row.survives(features["prompt_logprobs"]) for row in rows] == [False, True]
    assert [row.survives(features["echo"]) for row in rows] == [True, True]
    parts = server_flags.row_of("prefill: 16 tokens")
    assert [parts.survives(features[name]) for name in ("seeded", "greedy")] == [False, True]


def test_vllm_answers_without_drafts():
    drafting = server_flags.row_of("places: one", "steps: ngram", "order: priority")
    assert drafting.words_of_vllm == ("--max-num-seqs", "1", "--scheduling-policy", "priority")
    other = server_flags.row_of("places: one")
    assert other.words_of_vllm == other.words


@pytest.mark.parametrize(
    ("ours", "theirs", "where"),
    [
        ({"a": [1, 2.0]}, {"a": [1, 2.0005]}, None),
        ({"a": [1, 2.0]}, {"a": [1, 2.1]}, ".a[1]: 2.0 instead of 2.1"),
        ({"a": [1]}, {"a": [1, 2]}, ".a: '[1]' instead of '[1, 2]'"),
        ({"a": "x"}, {"a": "y"}, ".a: 'x' instead of 'y'"),
        ({"a": 1}, {"b": 1}, ": \"{'a': 1}\" instead of \"{'b': 1}\""),
        ({"a": None}, {"a": 0.0}, ".a: 'None' instead of '0.0'"),
    ],
)
def test_where_two_answers_differ(ours, theirs, where):
    assert difference(ours, theirs) == where
