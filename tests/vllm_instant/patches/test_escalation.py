"""The patch that puts the escalation in front of the endpoints, with vLLM's check of API keys around it."""

import json

import pytest
from fastapi import FastAPI, Request
from fastapi.testclient import TestClient
from prometheus_client import REGISTRY
from scripted_deep_server import Always
from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware

from vllm_instant.deployment.circuit_breaker import GuardedPlugin
from vllm_instant.deployment.settings import resolve
from vllm_instant.interfaces.escalation import EscalationOptions
from vllm_instant.interfaces.plugins import PluginOptions
from vllm_instant.patches import escalation as patch
from vllm_instant.patches import http_handlers
from vllm_instant.patches.plugin_factory import PluginStartError

pytestmark = pytest.mark.engine
CHAT = {"model": "m", "messages": [{"role": "user", "content": "Prove it"}]}
KEY = {"Authorization": "Bearer k"}


@pytest.fixture
def deployment(tmp_path):
    file = tmp_path / "deploy.toml"
    file.write_text(
        '[escalation]\nplugin = "rules"\nrules = [{ pattern = "prove" }]\n[escalation.deep_settings]\nseed = 1\n'
    )
    return resolve(file)


@pytest.fixture
def app():
    """As ``build_app`` orders it: routes, endpoint plugins, then vLLM's middleware."""
    app = FastAPI()

    @app.post("/v1/chat/completions")
    async def chat(request: Request):
        return await request.json()

    app.state.switch = patch.attach(app)
    app.add_middleware(AuthenticationMiddleware, tokens=["k"])
    return app


@pytest.fixture
def started(app, deployment, monkeypatch):
    monkeypatch.setattr(patch, "context_of", lambda *_: None)
    monkeypatch.setattr(patch, "build_guarded", lambda *_: GuardedPlugin("escalation", "rules", Always()))
    before = set(REGISTRY._names_to_collectors.values())
    app.state.instant_escalation = patch.start(app.state.switch, None, deployment)
    yield TestClient(app)
    for collector in set(REGISTRY._names_to_collectors.values()) - before:
        REGISTRY.unregister(collector)


def test_before_the_engine_is_there_requests_pass(app):
    answer = TestClient(app).post("/v1/chat/completions", json=CHAT, headers=KEY)
    assert answer.json() == CHAT
    assert "x-instant-answered-by" not in answer.headers


def test_a_request_without_a_key_is_not_even_read(started, app):
    assert started.post("/v1/chat/completions", json=CHAT).status_code == 401
    assert not app.state.instant_escalation.decisions(1)


def test_a_request_with_a_key_is_answered_by_the_end_that_was_chosen(started, app):
    answer = started.post("/v1/chat/completions", json=CHAT, headers=KEY)
    assert answer.json() == {**CHAT, "seed": 1}
    assert answer.headers["x-instant-answered-by"] == "deep"
    app.add_api_route("/v1/instant/escalation", http_handlers.show_escalation)
    shown = started.get("/v1/instant/escalation", headers=KEY).json()["engines"][0]["decisions"]
    assert [decision["answered_by"] for decision in shown] == ["deep"]
    assert "chatcmpl" not in json.dumps(shown)


def test_a_server_without_escalation_says_so(app):
    app.add_api_route("/v1/instant/escalation", http_handlers.show_escalation)
    answer = TestClient(app).get("/v1/instant/escalation", headers=KEY)
    assert (answer.status_code, answer.json()["detail"]) == (404, "this server has no escalation")


def test_it_is_served_where_a_plugin_is_chosen(deployment):
    assert patch.is_served(deployment)
    assert not patch.is_served(resolve())
    assert not patch.is_served(None)


def test_a_plugin_needs_the_options_of_every_escalation(app, deployment, monkeypatch):
    monkeypatch.setattr(patch, "context_of", lambda *_: None)
    monkeypatch.setattr(patch, "build_guarded", lambda *_: GuardedPlugin("escalation", "odd", Always()))
    monkeypatch.setattr(patch, "plugin_options", lambda *_: PluginOptions())
    with pytest.raises(PluginStartError, match=f"must derive its options from {EscalationOptions.__name__}"):
        patch.start(app.state.switch, None, deployment)
    assert app.state.switch.service is None
