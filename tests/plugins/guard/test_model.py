"""A guard model at a URL: its answers become verdicts, and a request that fails is sent again."""

import asyncio
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from closing_server import closing_server

from vllm_instant.interfaces.guard import Action, GuardRequest
from vllm_instant_plugins.guard import model_client
from vllm_instant_plugins.guard.plugin import ModelOptions, build_model


@pytest.fixture
def server():
    asked, failures = [], [0]

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            asked.append((self.path, self.headers["authorization"], body))
            if failures[0]:
                failures[0] -= 1
                self.send_error(503)
                return
            text = body["messages"][0]["content"]
            answer = "\n unsafe\nS1" if "bomb" in text else "safe, not unsafe"
            data = json.dumps({"choices": [{"message": {"content": answer}}]}).encode()
            self.send_response(200)
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_):
            return

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        running.asked, running.failures = asked, failures
        yield running
        running.shutdown()


def judged(server, text, **options):
    url = f"http://127.0.0.1:{server.server_port}/v1"
    guard = build_model(ModelOptions(url=url, model="guard", api_key="key", **options))
    woken = threading.Event()
    judge = guard.begin(GuardRequest(request_id="r", side="answer", wake=woken.set))
    assert judge.judge(text, (), True).upto == 0
    assert woken.wait(20)
    verdict = judge.judge("", (), True)
    guard.process.close()
    return verdict, guard


def test_the_models_answer_decides(server):
    assert judged(server, "a harmless text")[0].upto == 15
    assert judged(server, "a bomb")[0].action is Action.STOP
    path, authorization, body = server.asked[0]
    assert (path, authorization, body["model"]) == ("/v1/chat/completions", "Bearer key", "guard")
    assert body["messages"] == [{"role": "user", "content": "a harmless text"}]


def test_a_request_that_fails_is_sent_again(server, monkeypatch):
    monkeypatch.setattr(model_client, "RETRY_SECONDS", 0.01)
    server.failures[0] = 2
    verdict, guard = judged(server, "a bomb")
    assert verdict.action is Action.STOP
    assert guard.metrics()["restarts"] == 2


def test_a_pause_between_texts_is_no_failure(monkeypatch):
    monkeypatch.setattr(model_client, "RETRY_SECONDS", 0.01)

    async def run():
        awake = asyncio.get_running_loop().call_soon_threadsafe
        async with closing_server('{"choices": [{"message": {"content": "safe"}}]}') as url:
            client = model_client.ModelClient(url, "guard", "unsafe", None, 5.0, 1)
            for _ in range(2):
                scored = asyncio.Event()
                client.submit("a text", lambda score, seconds, done=scored.set: awake(done))
                await asyncio.wait_for(scored.wait(), 10)
                await asyncio.sleep(1.1)
            assert client.num_restarts == 0
            client.close()

    asyncio.run(run())


def test_a_pattern_that_is_not_valid_is_a_sentence():
    with pytest.raises(ValueError, match="RE2 cannot compile it"):
        build_model(ModelOptions(url="http://127.0.0.1:9", model="m", unsafe_pattern="("))
