"""Streams are counted by token, whatever the events look like and however the bytes are cut."""

import itertools
import json

import numpy as np
import pytest
from fake_server import FakeServer, serving
from hypothesis import given
from hypothesis import strategies as st

from vllm_instant.tools.measure.http_client import sync_client
from vllm_instant.tools.measure.streaming_client import stream_completion
from vllm_instant.tools.measure.token_stream import StreamedAnswer, StreamError, TokenStream

DONE = b"data: [DONE]\n\n"


def event(tokens, text="word", **more):
    usage = {} if tokens is None else {"usage": {"prompt_tokens": 7, "completion_tokens": tokens}}
    return f"data: {json.dumps({'id': 'cmpl-1', 'choices': [{'text': text}], **usage, **more})}\n\n".encode()


def read(*pieces):
    """The answer of a stream whose pieces arrive one second apart."""
    answer = StreamedAnswer()
    stream = TokenStream(answer)
    for now, piece in enumerate(pieces):
        stream.feed(piece, float(now))
    stream.end()
    return answer


@given(st.lists(st.integers(1, 400), max_size=12))
def test_however_the_bytes_are_cut_the_tokens_are_the_same(cuts):
    whole = b"".join(event(tokens) for tokens in (0, 1, 5, 123, 124)) + DONE
    ends = sorted({0, len(whole), *(cut % len(whole) for cut in cuts)})
    answer = read(*(whole[a:b] for a, b in itertools.pairwise(ends)))
    assert answer.tokens == 124
    assert [tokens for _, tokens in answer.arrivals] == sorted({tokens for _, tokens in answer.arrivals})
    assert (answer.id, answer.prompt_tokens) == ("cmpl-1", 7)


def test_several_tokens_in_one_event_share_its_time():
    answer = read(event(4), event(8), event(12), DONE)
    assert answer.arrivals == [(0.0, 4), (1.0, 8), (2.0, 12)]
    assert answer.inter_token_latencies() == pytest.approx([0.25] * 8)
    assert answer.tokens_per_second == 4.0


def test_events_that_are_read_at_once_arrived_together():
    answer = StreamedAnswer()
    stream = TokenStream(answer)
    for now, tokens in ((1.0, 1), (1.0005, 3), (1.002, 4)):
        stream.feed(event(tokens), now)
    assert answer.arrivals == [(1.0, 3), (1.002, 4)]


def test_without_usage_an_event_with_text_is_a_token():
    assert read(event(None, ""), event(None), event(None), event(None, ""), DONE).tokens == 2


def test_accepted_drafts_are_read_where_the_server_reports_them():
    metrics = {"speculative_decoding": {"num_accepted_draft_tokens": 9}}
    assert read(event(4), event(12, metrics=metrics), DONE).accepted == 9
    assert read(event(4), DONE).accepted is None


@pytest.mark.parametrize(
    ("pieces", "message"),
    [
        ([event(1)], "the answer broke off"),
        ([DONE], "the answer ended without a token"),
        ([event(1), b'data: {"error": {"message": "dead"}}\n\n'], "ends with an error.*dead"),
    ],
)
def test_incomplete_answers_are_errors(pieces, message):
    with pytest.raises(StreamError, match=message):
        read(*pieces)


def test_times_can_count_from_any_second():
    answer = StreamedAnswer("code", [(10.1, 1), (10.3, 5), (10.4, 6)], sent=10.0, ended=10.5).since(10.0)
    assert [when for when, _ in answer.arrivals] == pytest.approx([0.1, 0.3, 0.4])
    assert (answer.sent, answer.ttft, answer.ended) == pytest.approx((0.0, 0.1, 0.5))
    assert answer.seconds_to(2) == answer.seconds_to(5) == pytest.approx(0.3)
    assert np.isnan(answer.seconds_to(7))


def test_an_answer_without_tokens_has_no_times():
    assert np.isnan(StreamedAnswer().ttft)
    assert np.isnan(StreamedAnswer().tokens_per_second)


def test_a_streamed_completion_brings_its_text():
    pieces = []
    with serving(FakeServer()) as url, sync_client(url) as client:
        answer = stream_completion(client, "fake", "p", pieces.append, max_tokens=3)
    assert answer.text == "".join(pieces) == "xxx"
    assert answer.tokens == 3
    assert 0 < answer.ttft <= answer.ended


def test_a_refused_completion_is_an_error():
    with (
        serving(FakeServer(status=503)) as url,
        sync_client(url) as client,
        pytest.raises(StreamError, match="HTTP 503"),
    ):
        stream_completion(client, "fake", "p", max_tokens=3)


def thought(field: str, tokens: int) -> bytes:
    delta = json.dumps({"choices": [{"delta": {field: "x"}}], "usage": {"completion_tokens": tokens}})
    return f"data: {delta}\n\n".encode()


def test_the_answer_begins_after_thinking():
    answer = StreamedAnswer()
    stream = TokenStream(answer)
    for now, event in enumerate([thought("reasoning", 3), thought("reasoning_content", 5), thought("content", 6)]):
        stream.feed(event, float(now))
    assert (answer.ttft, answer.answer_at, answer.thinking_tokens) == (0.0, 2.0, 5)
    assert answer.since(1.0).answer_at == 1.0


def test_the_end_of_thinking_is_found_among_events_that_arrive_together():
    answer = StreamedAnswer()
    stream = TokenStream(answer)
    stream.feed(thought("reasoning", 3), 0.0)
    stream.feed(thought("reasoning", 5) + thought("content", 6) + thought("content", 8), 1.0)
    assert (answer.answer_at, answer.thinking_tokens, answer.tokens) == (1.0, 5, 8)


def test_an_answer_without_thinking_has_no_second_first_token():
    answer = StreamedAnswer()
    TokenStream(answer).feed(thought("content", 1) + thought("content", 2), 0.0)
    assert (answer.answer_at, answer.thinking_tokens) == (None, 0)


def test_an_answer_that_only_thinks_never_begins():
    answer = StreamedAnswer()
    TokenStream(answer).feed(thought("reasoning", 4), 0.0)
    assert (answer.answer_at, answer.thinking_tokens) == (None, 4)
