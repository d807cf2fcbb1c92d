"""Drafts of a model that vLLM serves, with a stand-in for its API."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from math import log

import numpy as np
import pytest

from vllm_instant.tools.draft_server.drafting import Guess
from vllm_instant.tools.draft_server.model import ModelError
from vllm_instant.tools.draft_server.served_model import ServedModel

SEQUENCE = np.array([1, 2, 3], np.int32)


@pytest.fixture
def api():
    """Counts up; ``answer`` replaces what it says."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self._say({"data": [{"id": "draft", "max_model_len": 10}]})

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            server.asked.append((body, self.headers["authorization"]))
            tokens = [body["prompt"][-1] + step for step in range(1, body["max_tokens"] + 1)]
            tops = [{f"token_id:{token}": log(0.5), "token_id:0": log(0.25)} for token in tokens]
            names = [f"token_id:{token}" for token in tokens]
            self._say(server.answer or {"choices": [{"logprobs": {"tokens": names, "top_logprobs": tops}}]})

        def _say(self, answer):
            content = json.dumps(answer).encode()
            self.send_response(server.status)
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.asked, server.answer, server.status = [], None, 200
    server.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_it_drafts_greedily_and_knows_the_likeliest_other_token(api):
    model = ServedModel(f"{api.url}/v1", 100, "secret")
    assert (model.max_tokens, model.vocab_size) == (10, 100)
    found = model.draft("r", "tenant", SEQUENCE, 2, 100)
    assert found == [Guess(4, pytest.approx(0.5), 0, pytest.approx(0.25)), Guess(5, *found[1][1:])]
    body, key = api.asked[-1]
    assert body["prompt"] == [1, 2, 3]
    assert (body["temperature"], body["ignore_eos"], key) == (0, True, "Bearer secret")


def test_owners_share_no_cached_prefix(api):
    model = ServedModel(api.url, 100)
    for owner in ("a", "b", "a"):
        model.draft("r", owner, SEQUENCE, 1, 100)
    one, other, again = (body["cache_salt"] for body, _ in api.asked)
    assert one == again != other


def test_drafts_end_at_the_models_length_and_before_tokens_that_the_target_lacks(api):
    model = ServedModel(api.url, 100)
    assert len(model.draft("r", 0, np.arange(8, dtype=np.int32), 5, 100)) == 2
    assert model.draft("r", 0, np.arange(10, dtype=np.int32), 5, 100) == []
    assert [guess.token for guess in model.draft("r", 0, SEQUENCE, 5, 6)] == [4, 5]


@pytest.mark.parametrize(
    ("status", "answer", "message"),
    [
        (503, {"error": "busy"}, "answers HTTP 503"),
        (200, {"choices": []}, "answers as no vLLM does"),
        (200, {"choices": [{"logprobs": None}]}, "answers as no vLLM does"),
        (200, {"choices": [{"logprobs": {"tokens": ["the"], "top_logprobs": [{"the": 0.0}]}}]}, "as no vLLM does"),
    ],
)
def test_what_is_no_answer_is_one_sentence(api, status, answer, message):
    model = ServedModel(api.url, 100)
    api.status, api.answer = status, answer
    with pytest.raises(ModelError, match=message):
        model.draft("r", 0, SEQUENCE, 2, 100)


def test_a_server_that_is_not_there_is_one_sentence(api):
    api.shutdown()
    api.server_close()
    with pytest.raises(ModelError, match="does not answer"):
        ServedModel(api.url, 100)
