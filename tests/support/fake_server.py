"""A server that samples from a made-up distribution: what `verify`, `bench` and tasks ask, without a model."""

from __future__ import annotations

import json
import math
import random
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

CHANCES = {7: 0.5, 8: 0.3, 9: 0.15, 10: 0.05}


class FakeServer:
    """Answers like vLLM's completions route, as far as `verify` and `bench` look.

    Args:
        chances: of each token, the same at every position.
        drafts: draft tokens that count as verified for each completion; half of them as accepted.
        deployment: what ``/v1/instant/deployment`` answers; None for stock vLLM.
        keeps_seeds: whether a seed says the same twice.
        bias: added to the log-probability of each text token.
        root: the model that it was started with.
        step_seconds: time between the events of a stream.
        step_tokens: tokens of one event; all but one count as accepted draft tokens.
        kv_tokens: capacity of the KV cache; None leaves it out of the metrics.
        before_stream: called before the first event of each streamed answer.
        text_of: the text of the answer to a request's body.

    """

    def __init__(
        self,
        chances=None,
        drafts=0,
        deployment=None,
        keeps_seeds=True,
        bias=0.0,
        status=200,
        lossy=False,
        key=None,
        root="models/fake",
        step_seconds=0.002,
        step_tokens=1,
        kv_tokens=1000,
        before_stream=lambda: None,
        text_of=lambda body: "x" * body["max_tokens"],
    ):
        self.chances = dict(chances or CHANCES)
        self.drafts = drafts
        self.deployment = deployment
        self.keeps_seeds = keeps_seeds
        self.bias = bias
        self.status = status
        self.lossy = lossy
        self.key = key
        self.root = root
        self.step_seconds = step_seconds
        self.step_tokens = step_tokens
        self.kv_tokens = kv_tokens
        self.before_stream = before_stream
        self.text_of = text_of
        self.drafted = 0
        self.requests: list[dict[str, Any]] = []

    def metrics(self) -> str:
        """What ``/metrics`` says."""
        lines = [f'vllm_instant:plugin_info{{plugin="x",lossy="{"yes" if self.lossy else "no"}"}} 1.0']
        if self.drafts:
            lines.append(f'vllm:spec_decode_num_draft_tokens_total{{engine="0"}} {float(self.drafted)}')
            lines.append(f'vllm:spec_decode_num_accepted_tokens_total{{engine="0"}} {float(self.drafted // 2)}')
        if self.kv_tokens:
            labels = f'kv_cache_size_tokens="{self.kv_tokens}",kv_cache_memory_bytes="64000"'
            lines.append(f'vllm:cache_config_info{{{labels},engine="0"}} 1.0')
        return "\n".join(lines) + "\n"

    def stream(self, body: dict[str, Any]):
        """The events of a streamed answer, as vLLM writes them when asked for ``continuous_usage_stats``."""
        self.requests.append(body)
        self.before_stream()
        tokens = 0
        while tokens < body["max_tokens"]:
            time.sleep(self.step_seconds)
            tokens = min(body["max_tokens"], tokens + self.step_tokens)
            event: dict[str, Any] = {"choices": [{"text": "x"}], "usage": {"completion_tokens": tokens}}
            if tokens == body["max_tokens"] and self.drafts:
                steps = -(-tokens // self.step_tokens)
                event["metrics"] = {"speculative_decoding": {"num_accepted_draft_tokens": tokens - steps}}
            yield f"data: {json.dumps(event)}\n\n"
        yield "data: [DONE]\n\n"

    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        self.requests.append(body)
        choices = []
        for _ in range(body.get("n", 1)):
            seed = body.get("seed") if self.keeps_seeds else None
            generator = random.Random(seed) if seed is not None else random
            count = body["max_tokens"]
            if body["temperature"] == 0:
                tokens = [max(self.chances, key=self.chances.get)] * count
            else:
                tokens = generator.choices(list(self.chances), list(self.chances.values()), k=count)
            self.drafted += self.drafts
            prompt = body["prompt"] if isinstance(body.get("prompt"), list) else [7, 8, 9, 7, 10]
            text = self.text_of(body)
            choice: dict[str, Any] = {"token_ids": tokens, "prompt_token_ids": prompt, "text": text}
            if "messages" in body:
                choice["message"] = {"role": "assistant", "content": choice.pop("text")}
            if "prompt_logprobs" in body:
                entry = {str(t): {"logprob": math.log(p) + self.bias * (t == 7)} for t, p in self.chances.items()}
                choice["prompt_logprobs"] = [None, *([entry] * (len(prompt) - 1))]
            choices.append(choice)
        return {"choices": choices}


@contextmanager
def serving(fake: FakeServer):
    """The server's address, while it serves."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _answer(self, status, content):
            data = content.encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def _chunk(self, text):
            data = text.encode()
            self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
            self.wfile.flush()

        def do_GET(self):
            if fake.key is not None and self.headers.get("Authorization") != f"Bearer {fake.key}":
                self._answer(401, "{}")
            elif self.path == "/v1/models":
                self._answer(200, json.dumps({"data": [{"id": "fake", "root": fake.root, "max_model_len": 100}]}))
            elif self.path == "/version":
                self._answer(200, '{"version": "9.9"}')
            elif self.path == "/metrics":
                self._answer(200, fake.metrics())
            elif self.path == "/v1/instant/deployment" and fake.deployment is not None:
                self._answer(200, json.dumps(fake.deployment))
            else:
                self._answer(404, "{}")

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if fake.status != 200:
                self._answer(fake.status, "the engine is dead")
            elif body.get("stream"):
                self.send_response(200)
                self.send_header("Transfer-Encoding", "chunked")
                self.end_headers()
                for event in fake.stream(body):
                    self._chunk(event)
                self._chunk("")
            else:
                self._answer(200, json.dumps(fake.complete(body)))

        def log_message(self, *arguments):
            pass

    class Listener(ThreadingHTTPServer):
        request_queue_size = 64  # five by default: further connections at the same moment are reset

    server = Listener(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
