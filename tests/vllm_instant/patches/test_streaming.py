"""What keeps reading ahead out of vLLM's numbers, and what stops a server that cannot read ahead."""

import asyncio
from types import SimpleNamespace

import pytest
import virtual_time
from fastapi import FastAPI
from fastapi.testclient import TestClient
from patch_harness import wrap
from prometheus_client import CollectorRegistry
from starlette.responses import JSONResponse

from vllm_instant.deployment import deployment_env
from vllm_instant.deployment.circuit_breaker import GuardedPlugin
from vllm_instant.deployment.settings import resolve
from vllm_instant.interfaces.streaming import EngineLoad, StreamingPrefill
from vllm_instant.metrics import InstantMetrics
from vllm_instant.patches import http_routes, streaming
from vllm_instant.patches.http_routes import InstantEndpoints
from vllm_instant.patches.names import OUTPUT_PROCESSOR
from vllm_instant.patches.plugin_factory import PluginStartError
from vllm_instant.streaming.engine import CommitFlag, Prompt, RequestError


class Stats:
    def __init__(self):
        self.seen = []


def processor():
    """A stand-in for vLLM's module, with the patch in place."""

    class OutputProcessor:
        def _update_stats_from_output(self, req_state, output, timestamp, stats):
            if stats is not None:
                stats.seen.append(output)
            req_state.bookkeeping.append(output)

        def _update_stats_from_finished(self, req_state, finish_reason, stats):
            if stats is not None:
                stats.seen.append(finish_reason)
            req_state.bookkeeping.append(finish_reason)

    wrap(streaming.PATCH, OUTPUT_PROCESSOR, OutputProcessor=OutputProcessor)
    return OutputProcessor()


def state(name):
    return SimpleNamespace(external_req_id=name, bookkeeping=[])


def test_prefills_keep_their_bookkeeping_but_are_not_counted():
    tested, stats = processor(), Stats()
    for name in ("chatcmpl-1", f"{streaming.PREFILL_PREFIX}2"):
        request = state(name)
        tested._update_stats_from_output(request, "token", 0.0, stats)
        tested._update_stats_from_finished(request, "length", stats)
        tested._update_stats_from_output(request, "later", 0.0, None)
        assert request.bookkeeping == ["token", "length", "later"]
    assert stats.seen == ["token", "length"]


def test_an_answer_counts_from_when_it_is_asked_for(monkeypatch):
    tested, stats, early = processor(), Stats(), CommitFlag()
    monkeypatch.setitem(streaming._EARLY, "chatcmpl-3", early)
    request = state("chatcmpl-3")
    tested._update_stats_from_output(request, "before", 0.0, stats)
    early.committed = True
    tested._update_stats_from_output(request, "after", 0.0, stats)
    tested._update_stats_from_finished(request, "length", stats)
    assert stats.seen == ["after", "length"]


def client(prefix_caching=True, unfinished=0, ranks=1, **cache):
    config = SimpleNamespace(
        scheduler_config=SimpleNamespace(max_num_seqs=8),
        cache_config=SimpleNamespace(block_size=32, enable_prefix_caching=prefix_caching),
        parallel_config=SimpleNamespace(
            data_parallel_size=ranks, data_parallel_external_lb=False, data_parallel_hybrid_lb=False
        ),
    )
    return SimpleNamespace(vllm_config=config, get_num_unfinished_requests=lambda: unfinished)


class Chat:
    """As much of vLLM's chat endpoint as the patch asks."""

    def __init__(self, lines=(), refusal=None):
        self.lines, self.refusal, self.asked, self.closed = lines, refusal, [], False

    async def create_chat_completion(self, request, raw_request):
        self.asked.append((request, raw_request))
        if self.refusal is not None:
            return SimpleNamespace(error=SimpleNamespace(message=self.refusal, code=404))
        return self._stream()

    async def _stream(self):
        try:
            for line in self.lines:
                yield line
        finally:
            self.closed = True


REQUEST = {"model": "m", "messages": [{"role": "user", "content": "x"}]}


def chunks(engine, early=None, most=99, affinity=5):
    async def run():
        found = []
        answer = engine.answer(REQUEST, affinity, early)
        async for chunk in answer:
            found.append(chunk)
            if len(found) == most:
                await answer.aclose()
                break
        return found

    return asyncio.run(run())


@pytest.mark.engine
def test_answers_are_those_of_the_chat_endpoint():
    chat = Chat(['data: {"choices": [1]}\n\n', 'data: {"choices": [2]}\n\n', "data: [DONE]\n\n"])
    engine = streaming.VllmStreamingEngine(client(), chat)
    assert chunks(engine) == [{"choices": [1]}, {"choices": [2]}]
    (request, raw_request), *_ = chat.asked
    assert request.stream
    assert raw_request is None


@pytest.mark.engine
def test_an_answer_that_is_left_is_stopped_and_forgotten():
    chat = Chat(['data: {"choices": [1]}\n\n'] * 9)
    engine = streaming.VllmStreamingEngine(client(unfinished=1), chat)
    before = dict(streaming._EARLY)
    assert engine.load() == EngineLoad(1, 8)
    assert len(chunks(engine, CommitFlag(), most=2)) == 2
    assert chat.closed
    assert streaming._EARLY == before
    assert engine.load() == EngineLoad(1, 8)


@pytest.mark.engine
def test_with_several_engines_a_session_stays_with_one():
    chat = Chat(["data: [DONE]\n\n"])
    chunks(streaming.VllmStreamingEngine(client(ranks=4), chat))
    assert chat.asked[0][1].headers["X-data-parallel-rank"] == "1"


@pytest.mark.engine
@pytest.mark.parametrize(
    ("chat", "told"),
    [
        (Chat(refusal="no such model"), "no such model"),
        (Chat(['data: {"error": {"message": "broken", "code": 500}}\n\n']), "broken"),
    ],
)
def test_refusals_keep_their_words(chat, told):
    with pytest.raises(RequestError, match=told):
        chunks(streaming.VllmStreamingEngine(client(), chat))


@pytest.mark.engine
def test_a_body_that_is_no_chat_request_is_named():
    engine = streaming.VllmStreamingEngine(client(), Chat())
    with pytest.raises(RequestError, match="temperature"):
        asyncio.run(engine.render({**REQUEST, "temperature": "hot"}))
    assert Prompt([]).token_ids == []


def test_only_a_deployment_that_reads_ahead_has_the_routes(write_file, monkeypatch):
    def paths(deployment):
        monkeypatch.setattr(deployment_env, "get_deployment", lambda: deployment)
        app = FastAPI()
        InstantEndpoints().attach_router(app)
        return {route.path for route in app.routes}

    assert "/v1/instant/session" not in paths(resolve())
    with_plugin = paths(resolve(write_file('[streaming]\nplugin = "chunked"\n')))
    assert {"/v1/instant/session", "/v1/instant/sessions", "/v1/instant/tokens"} <= with_plugin


@pytest.mark.parametrize(
    ("engine_client", "state", "told"),
    [
        (client(prefix_caching=False), SimpleNamespace(openai_serving_chat=1), "remove --no-enable-prefix-caching"),
        (client(), SimpleNamespace(openai_serving_chat=None), "no /v1/chat/completions"),
    ],
)
def test_a_server_that_cannot_read_ahead_says_why(write_file, monkeypatch, engine_client, state, told):
    deployment = resolve(write_file('[streaming]\nplugin = "chunked"\n'))
    monkeypatch.setattr(streaming, "context_of", lambda *_: SimpleNamespace(max_model_len=1000))
    with pytest.raises(PluginStartError, match=told):
        streaming.start(None, FastAPI(), engine_client, state, deployment)


@pytest.mark.parametrize("built", [False, True])
def test_tokens_stand_before_the_key_check_whenever_that_was_put_together(built):
    class AuthenticationMiddleware:
        def __init__(self, app, tokens):
            self.app, self.tokens = app, tokens

        async def __call__(self, scope, receive, send):
            headers = dict(scope.get("headers", ()))
            if scope["type"] == "http" and headers.get(b"authorization") != f"Bearer {self.tokens[0]}".encode():
                await JSONResponse({}, status_code=401)(scope, receive, send)
            else:
                await self.app(scope, receive, send)

    app = FastAPI()
    routes = streaming.attach(app)
    app.add_middleware(AuthenticationMiddleware, tokens=["key"])
    if built:
        app.middleware_stack = app.build_middleware_stack()
    routes.manager = SimpleNamespace(limits=SimpleNamespace(demo_page=False))
    streaming._accept_session_tokens(app, routes, streaming.checked_keys(app))
    routes.manager = None
    client = TestClient(app)
    assert client.post("/v1/instant/sessions").status_code == 401
    token = {"Authorization": f"Bearer {routes.tokens.make(None, 60, 'key')}"}
    assert client.post("/v1/instant/sessions", headers=token).status_code == 503  # let in, but nothing serves here
    assert client.get("/v1/instant/demo").status_code == 401


def test_a_failure_in_the_api_server_is_counted():
    class Broken(StreamingPrefill):
        def next_chunk(self, progress, load):
            raise ValueError("no")

    plugin = GuardedPlugin("streaming", "broken", Broken())
    plugin.call("next_chunk", lambda p: p.next_chunk(None, None), 0)

    async def answer(method):
        return [{"speculation": None, "failures": []}]

    registry = CollectorRegistry()

    async def run():
        engine_client = SimpleNamespace(engine_core=SimpleNamespace(call_utility_all_async=answer))
        polling = asyncio.create_task(http_routes._poll(engine_client, InstantMetrics(resolve(), registry), plugin))
        await asyncio.sleep(0.05)
        polling.cancel()

    virtual_time.run(run())
    labels = {"engine": http_routes.API_SERVER, "slot": "streaming", "plugin": "broken", "hook": "next_chunk"}
    assert registry.get_sample_value("vllm_instant:plugin_failures_total", labels) == 1


@pytest.mark.engine
def test_an_answer_loads_the_engine_from_when_it_is_asked_for():
    chat = Chat(['data: {"choices": [1]}\n\n'] * 3)
    engine = streaming.VllmStreamingEngine(client(unfinished=1), chat)

    async def run():
        early = CommitFlag()
        answer = engine.answer(REQUEST, 5, early)
        await anext(answer)
        assert engine.load() == EngineLoad(0, 8, num_speculative=1)
        early.committed = True
        assert engine.load() == EngineLoad(1, 8)
        await answer.aclose()

    asyncio.run(run())
