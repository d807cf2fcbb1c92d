"""Recorded traffic: every format that can be read, and what is sent for it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from vllm_instant_loadtests import schedule
from vllm_instant_loadtests.scenario import ScenarioError, parse
from vllm_instant_loadtests.traces import TraceError, prefix_share, read_trace

MOONCAKE = [
    {"timestamp": 1000, "input_length": 1100, "output_length": 20, "hash_ids": [1, 2, 3]},
    {"timestamp": 3000, "input_length": 1500, "output_length": 30, "hash_ids": [1, 2, 4]},
    {"timestamp": 2000, "input_length": 512, "output_length": 10, "hash_ids": [9]},
]


def lines(*entries) -> str:
    return "\n".join(map(json.dumps, entries)) + "\n"


def read(folder: Path, text: str):
    file = folder / "trace"
    file.write_text(text)
    return read_trace(file)


def span(began: float, ended: float, read_tokens: int = 10, session: str | None = "c", **attributes):
    values = {"gen_ai.usage.input_tokens": read_tokens, "gen_ai.usage.output_tokens": 5, **attributes}
    named = [{"key": key, "value": {"intValue": str(value)}} for key, value in values.items()]
    named += [{"key": "gen_ai.conversation.id", "value": {"stringValue": session}}] if session else []
    times = {"startTimeUnixNano": str(int(began * 1e9)), "endTimeUnixNano": str(int(ended * 1e9))}
    return {"traceId": "t", **times, "attributes": named}


def export(*spans):
    return {"resourceSpans": [{"scopeSpans": [{"spans": list(spans)}]}]}


def test_mooncake(tmp_path):
    found = read(tmp_path, lines(*MOONCAKE))
    assert [(one.at, one.input_tokens, one.output_tokens) for one in found] == [
        (0, 1100, 20),
        (1, 512, 10),
        (2, 1500, 30),
    ]
    assert found[2].hash_ids == (1, 2, 4)
    assert not any(one.after for one in found)


def test_mooncake_with_sessions_of_aiperf(tmp_path):
    first = {"session_id": "x", "timestamp": 500, "input_length": 40, "output_length": 4}
    later = {"session_id": "x", "delay": 1500, "input_length": 60, "output_length": 4, "text_input": "Go on."}
    found = read(tmp_path, lines(first, later))
    assert (found[1].after, found[1].pause, found[1].text) == ((0,), 1.5, "Go on.")


def test_azure(tmp_path):
    text = "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03.9799600,4808,10\n"
    text += "2023-11-16 18:17:04.4799600,3180,8\n"
    found = read(tmp_path, text)
    assert [one.input_tokens for one in found] == [4808, 3180]
    assert found[1].at == pytest.approx(0.5)


def test_burstgpt_with_and_without_sessions(tmp_path):
    plain = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n5,ChatGPT,472,18,490,API log\n"
    plain += "45,ChatGPT,1087,0,1087,API log\n"  # a failure
    assert [(one.at, one.input_tokens) for one in read(tmp_path, plain)] == [(0, 472)]
    talks = "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
    talks += "0,s,2,GPT-4,10,5,15,Conversation log\n6,s,2,GPT-4,30,5,35,Conversation log\n"
    found = read(tmp_path, talks)
    assert (found[1].after, found[1].pause) == ((0,), 4.0)


def test_opentelemetry_finds_parallel_calls_and_what_joins_them(tmp_path):
    spans = [span(0, 1), span(2, 4), span(2.5, 5), span(6, 7), span(0, 8, **{"gen_ai.operation.name": "x"})]
    spans[-1]["attributes"][2]["value"] = {"stringValue": "invoke_agent"}  # sums up the others
    for text in (json.dumps(export(*spans), indent=1), lines(export(*spans[:2]), export(*spans[2:]))):
        found = read(tmp_path, text)
        assert [one.after for one in found] == [(), (0,), (0,), (1, 2)]
        assert [one.pause for one in found] == [0, 1, 1.5, 1]


def test_spans_without_a_conversation_belong_to_their_trace(tmp_path):
    assert [one.session for one in read(tmp_path, json.dumps(export(span(0, 1, session=None))))] == ["t"]


def test_files_of_guidellm_and_aiperf(tmp_path):
    old = {"start_time": 7.0, "prompt_tokens": 50, "output_tokens": 9}
    new = {"request_start_time": 8.0, "prompt_tokens": 60, "output_tokens": 9}
    guidellm = {"metadata": {}, "benchmarks": [{"requests": {"successful": [old, new], "errored": []}}]}
    found = read(tmp_path, json.dumps(guidellm))
    assert [(one.at, one.input_tokens) for one in found] == [(0, 50), (1, 60)]
    about = {"conversation_id": "c", "x_correlation_id": "u", "turn_index": 0}
    sizes = {"input_sequence_length": {"value": 550}, "output_sequence_length": {"value": 9}}
    turns = [
        {"metadata": {**about, "request_start_ns": n * 10**9, "request_end_ns": (n + 1) * 10**9}, "metrics": sizes}
        for n in (3, 6)
    ]
    failed = {"metadata": {**about, "request_start_ns": 9 * 10**9}, "metrics": {}, "error": {"code": 499}}
    found = read(tmp_path, lines(*turns, failed))
    assert [(one.after, one.pause) for one in found] == [((), 0), ((0,), 2.0)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"input": 3}\n', "is JSON without input_length, resourceSpans, benchmarks, metadata"),
        ('{"input_length": 3}\n', "has an entry that cannot be read: output_length is missing"),
        ('{"input_length": 3, "output_length": "x"}\n', "has an entry that cannot be read: invalid literal"),
        ("when,what\n1,2\n", "should be one arrival time per line, or a trace of Mooncake"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n", "has no request with prompt and answer tokens"),
        ('{"resourceSpans": ', "is no JSON"),
    ],
)
def test_a_file_that_is_no_trace_is_one_sentence(tmp_path, text, message):
    with pytest.raises(TraceError) as error:
        read(tmp_path, text)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_arrival_times_alone_are_no_trace_with_lengths(tmp_path):
    assert read(tmp_path, "0.0\n1.5  # a comment\n") is None


def test_the_share_of_known_prefixes(tmp_path):
    found = read(tmp_path, lines(*MOONCAKE))
    assert prefix_share(found) == pytest.approx(1024 / (1100 + 512 + 1500))
    assert math.isnan(prefix_share(read(tmp_path, lines({**MOONCAKE[0], "hash_ids": []}))))


def planned(folder: Path, text: str, **more):
    (folder / "trace").write_text(text)
    traffic = {"kind": "t", "trace": "trace", **more}
    scenario = parse({"title": "t", "seconds": 100, "traffic": [traffic]}, folder / "s.toml")
    return schedule.scheduled_requests(scenario, "0")


def test_prompts_have_the_recorded_lengths_and_prefixes(tmp_path):
    first, alone, second = planned(tmp_path, lines(*MOONCAKE))
    assert [len(one.body["prompt"]) for one in (first, alone, second)] == [1100, 512, 1500]
    assert first.body["prompt"][:1024] == second.body["prompt"][:1024]
    assert first.body["prompt"][1024:1100] != second.body["prompt"][1024:1100]
    assert alone.body["prompt"][:16] != first.body["prompt"][:16]
    assert [one.body["max_tokens"] for one in (first, alone, second)] == [20, 10, 30]
    assert {one.route for one in (first, alone, second)} == {"completions"}
    assert all(256 <= token < 1000 for token in first.body["prompt"])


def test_lengths_can_be_scaled_with_their_blocks(tmp_path):
    first, _, second = planned(tmp_path, lines(*MOONCAKE), length_scale=1 / 32)
    assert len(first.body["prompt"]) == 34
    assert first.body["prompt"][:32] == second.body["prompt"][:32]
    assert first.body["max_tokens"] == 1


def test_the_first_requests_of_a_trace_can_be_sent_alone(tmp_path):
    assert len(planned(tmp_path, lines(*MOONCAKE), max_requests=2)) == 2


def test_a_recorded_conversation_waits_for_its_answers_and_continues_its_prompt(tmp_path):
    spans = [span(10, 11, 40), span(14, 15, 90)]
    first, second = planned(tmp_path, json.dumps(export(*spans)))
    assert (second.after, second.pause, second.session) == ([first.number], 3.0, first.number)
    assert second.body["prompt"][:40] == first.body["prompt"]


def test_a_trace_that_is_none_is_one_sentence_of_the_scenario(tmp_path):
    with pytest.raises(ScenarioError, match=r"the trace of 't' cannot be used: .*trace is JSON without"):
        planned(tmp_path, '{"a": 1}\n')
