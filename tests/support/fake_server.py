"""A completions server that samples from a made-up distribution: what `vllm-instant verify` asks, without a model."""

from __future__ import annotations

import json
import math
import random
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

CHANCES = {7: 0.5, 8: 0.3, 9: 0.15, 10: 0.05}


class FakeServer:
    """Answers like vLLM's completions route, as far as `verify` looks.

    Args:
        chances: of each token, the same at every position.
        drafts: draft tokens that count as verified for each completion; half of them as accepted.
        deployment: what ``/v1/instant/deployment`` answers; None for stock vLLM.
        keeps_seeds: whether a seed says the same twice.
        bias: added to the log-probability of each text token.

    """

    def __init__(
        self, chances=None, drafts=0, deployment=None, keeps_seeds=True, bias=0.0, status=200, lossy=False, key=None
    ):
        self.chances = dict(chances or CHANCES)
        self.drafts = drafts
        self.deployment = deployment
        self.keeps_seeds = keeps_seeds
        self.bias = bias
        self.status = status
        self.lossy = lossy
        self.key = key
        self.drafted = 0
        self.requests: list[dict[str, Any]] = []

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
            prompt = body["prompt"] if isinstance(body["prompt"], list) else [7, 8, 9, 7, 10]
            choice: dict[str, Any] = {"token_ids": tokens, "prompt_token_ids": prompt, "text": "x" * count}
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

        def do_GET(self):
            if fake.key is not None and self.headers.get("Authorization") != f"Bearer {fake.key}":
                self._answer(401, "{}")
            elif self.path == "/v1/models":
                self._answer(200, json.dumps({"data": [{"id": "fake"}]}))
            elif self.path == "/metrics":
                half = fake.drafted // 2
                self._answer(
                    200,
                    f'vllm_instant:plugin_info{{plugin="x",lossy="{"yes" if fake.lossy else "no"}"}} 1.0\n'
                    f'vllm:spec_decode_num_draft_tokens_total{{engine="0"}} {float(fake.drafted)}\n'
                    f'vllm:spec_decode_num_accepted_tokens_total{{engine="0"}} {float(half)}\n',
                )
            elif self.path == "/v1/instant/deployment" and fake.deployment is not None:
                self._answer(200, json.dumps(fake.deployment))
            else:
                self._answer(404, "{}")

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if fake.status != 200:
                self._answer(fake.status, "the engine is dead")
            else:
                self._answer(200, json.dumps(fake.complete(body)))

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
