"""What a server answers about its decisions, and what is there instead."""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from vllm_instant.tools.measure.http_client import base_url, is_local
from vllm_instant.tools.measure.sampling import RefusedError
from vllm_instant.tools.measure.server_info import newest_decisions, read_decisions, read_server_info

DECISIONS = json.dumps({"engines": [{"engine": 0, "decisions": [{"step": 1}]}]})
PAGE = "<!doctype html><html><body>Sign in</body></html>"


@contextmanager
def answering(text, status=200, kind="application/json"):
    """A server that gives one answer to every path, and the paths that were asked."""
    paths = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            paths.append(self.path.partition("?")[0])
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", paths
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("end", ["", "/", "/v1", "/v1/"])
def test_addresses_with_and_without_v1_are_the_same(end):
    with answering(DECISIONS) as (url, paths):
        assert newest_decisions(url + end, 5) == [{"step": 1}]
    assert paths == ["/v1/instant/decisions"]
    assert base_url(url + end) == url


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((PAGE, 200, "text/html"), "is no vLLM server with vllm-instant: it answers text/html"),
        (("[]", 200), "is no vLLM server with vllm-instant"),
        (("{}", 404), "runs without vllm-instant"),
        (("{}", 401), "wants an API key"),
        (("dead", 500), "answers HTTP 500: dead"),
    ],
)
def test_another_answer_than_decisions_is_one_sentence(answer, message):
    with answering(*answer) as (url, _), pytest.raises(RefusedError, match=message) as caught:
        read_decisions(url, {"last": 1})
    assert "\n" not in str(caught.value)


def test_a_web_page_is_no_vllm_server():
    with answering(PAGE, 200, "text/html") as (url, _), pytest.raises(RefusedError, match="is no running vLLM server"):
        read_server_info(url)


def test_only_loopback_addresses_are_local():
    assert all(map(is_local, ("http://127.0.0.1:1", "http://localhost:1", "http://[::1]:1", "http://127.8.8.8")))
    assert not any(map(is_local, ("http://10.0.0.1", "http://localhost.example.org", "http://127.0.0.1.example.org")))
