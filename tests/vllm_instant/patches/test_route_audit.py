"""No route answers without the key, and none shows a client what belongs to another or to the operator."""

import json
from types import SimpleNamespace

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware

from vllm_instant.deployment import deployment_env
from vllm_instant.deployment.settings import resolve
from vllm_instant.patches import streaming
from vllm_instant.patches.http_routes import InstantEndpoints, refuse_unguarded
from vllm_instant.patches.plugin_factory import PluginStartError

KEYS = ["sk-team-A", "sk-team-B"]
CANARY = "CANARY"
PUBLIC: set[tuple[str, str]] = set()
"""Method and path of the routes that answer without a key."""
SPELLINGS = (
    lambda path: path,
    lambda path: path + "/",
    lambda path: "/" + path,
    lambda path: path.replace("/v1", "/%76%31"),
    lambda path: path.replace("/instant", "//instant"),
    lambda path: path.replace("/v1", "/x/../v1"),
    lambda path: path.replace("/v1", "/./v1"),
    lambda path: path + "%20",
    lambda path: path + ";x",
    lambda path: path.upper(),
)
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE")


class Core:
    """An engine in which a request of another client runs."""

    async def call_utility_all_async(self, method, *arguments):
        if method == "instant_decisions":
            return [[{"step": 1, "request": f"chatcmpl-{CANARY}-1", "rows": [{"request_id": f"cmpl-{CANARY}"}]}]]
        return [{"experts": None, "failures": [], "speculation": None}]


@pytest.fixture
def app(write_file, monkeypatch):
    """The routes of a server with all kinds of secrets in its deployment, behind vLLM's own check of keys."""
    file = write_file(
        '[streaming]\nplugin = "chunked"\n[experts]\nplugin = "observed"\n'
        '[drafter]\nplugin = "remote"\nclient_drafts = true\n'
        f'[vllm]\napi_key = ["{CANARY}"]\nhf_token = "{CANARY}"\nssl_keyfile = "{CANARY}"\n'
    )
    deployment_env.set_deployment(resolve(file))
    app = FastAPI()
    endpoints = InstantEndpoints()
    endpoints.attach_router(app)
    app.add_middleware(AuthenticationMiddleware, tokens=KEYS)

    async def collective_rpc(*_, **__):
        return [{"answer": {}}]

    app.state.engine_client = SimpleNamespace(engine_core=Core(), collective_rpc=collective_rpc)
    app.state.instant_deployment = deployment_env.get_deployment()
    yield app
    deployment_env.clear_deployment()


def ours(app):
    """Method and path of our routes, with the methods that Starlette adds."""
    for route in app.routes:
        if route.path.startswith("/v1/instant"):
            for method in getattr(route, "methods", None) or ("WEBSOCKET",):
                yield method, route.path.replace("{session_id}", "sess_1_x")


def test_the_audit_sees_all_routes(app):
    assert {path for _, path in ours(app)} == {
        f"/v1/instant/{name}"
        for name in (
            "deployment",
            "decisions",
            "escalation",
            "experts",
            "guard",
            "session",
            "sessions",
            "sessions/sess_1_x",
            "tokens",
            "demo",
            "draft",
        )
    }


def test_no_route_answers_without_a_key(app):
    client = TestClient(app, raise_server_exceptions=False)
    for path in sorted({path for _, path in ours(app)}):
        for method in METHODS:
            for spelled in SPELLINGS:
                for headers in ({}, {"Authorization": KEYS[0]}):
                    answer = client.request(method, f"http://server{spelled(path)}", headers=headers)
                    if (method, path) not in PUBLIC:
                        # OPTIONS is let through by vLLM; the routes themselves know no OPTIONS.
                        assert answer.status_code in (401, 404, 405), (method, spelled(path), answer.status_code)
                        assert CANARY not in answer.text


def test_each_key_opens_each_route(app):
    client = TestClient(app)
    for key in KEYS:
        for path in ("deployment", "decisions", "experts"):
            answer = client.get(f"/v1/instant/{path}", headers={"Authorization": f"Bearer {key}"})
            assert answer.status_code == 200


def test_no_route_shows_ids_of_others_or_secrets(app):
    client = TestClient(app, raise_server_exceptions=False)
    headers = {"Authorization": f"Bearer {KEYS[1]}"}
    seen = 0
    for method, path in ours(app):
        if method == "WEBSOCKET":
            continue
        for query in ("", "?last=2048", "?queue=true", "?request_id=chatcmpl", "?request_id=chatcmpl-C", "?last=x"):
            for body in (None, {}, {"write": True}, [], "x"):
                sent = {} if body is None else {"json": body}
                answer = client.request(method, path + query, headers=headers, **sent)
                seen += answer.status_code == 200
                assert CANARY not in answer.text, (method, path, query, body)
                assert CANARY not in str(answer.headers)
    assert seen > 10


def test_experts_are_changed_with_the_operators_consent_only(app):
    client = TestClient(app)
    headers = {"Authorization": f"Bearer {KEYS[0]}"}
    for settings in ({"write": True}, {"forget": True}, {"budget": 0.1}):
        refused = client.post("/v1/instant/experts", headers=headers, json=settings)
        assert refused.status_code == 403
        assert "adjustable = true" in refused.text
    assert client.post("/v1/instant/experts", headers=headers, json={}).status_code == 200
    consented = deployment_env.get_deployment().model_dump(mode="json")
    consented["slots"]["experts"]["options"]["adjustable"] = True
    app.state.instant_deployment = type(deployment_env.get_deployment()).model_validate(consented)
    assert client.post("/v1/instant/experts", headers=headers, json={"write": True}).status_code == 200


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", None])
def test_a_page_cannot_post_to_experts_without_a_preflight(app, kind):
    headers = {"Authorization": f"Bearer {KEYS[0]}"} | ({"Content-Type": kind} if kind else {})
    answer = TestClient(app).post("/v1/instant/experts", headers=headers, content=json.dumps({}))
    assert answer.status_code in (400, 415, 422)


@pytest.mark.parametrize("root_path", ["/", "/v", "/v1/", "/v1/inst", "/i", "/v1x"])
def test_a_root_path_that_switches_the_check_of_keys_off_is_refused(root_path):
    with pytest.raises(PluginStartError, match=f"--root-path {root_path} switches"):
        refuse_unguarded(root_path, KEYS)
    refuse_unguarded(root_path, [])


@pytest.mark.parametrize("root_path", [None, "", "/api", "/v1", "/api/v1"])
def test_other_root_paths_keep_the_key_check(app, root_path):
    refuse_unguarded(root_path, KEYS)
    app.root_path = root_path or ""
    client = TestClient(app)
    for path in ("/v1/instant/deployment", f"{root_path or ''}/v1/instant/deployment"):
        assert client.get(path).status_code in (401, 404)


def test_a_refused_root_path_is_what_the_check_would_miss(app):
    app.root_path = "/"
    assert TestClient(app).get("/v1/instant/deployment").status_code == 200


def test_the_refusal_is_part_of_the_start(app, monkeypatch):
    import asyncio

    endpoints = InstantEndpoints()
    monkeypatch.setattr(streaming, "is_served", lambda _: False)
    endpoints.attach_router(app)
    with pytest.raises(PluginStartError):
        asyncio.run(endpoints.init_state(None, SimpleNamespace(), SimpleNamespace(root_path="/")))


def test_questions_to_the_engine_are_spaced_and_limited():
    import asyncio
    import itertools

    import virtual_time
    from fastapi import HTTPException

    from vllm_instant.patches import http_handlers

    async def run():
        questions, times, refused = http_handlers.Questions(), [], []

        async def ask():
            try:
                await questions.turn()
            except HTTPException as error:
                refused.append(error.status_code)
            else:
                times.append(virtual_time.clock())

        await ask()
        await asyncio.gather(*(ask() for _ in range(20)))
        assert refused == [429] * (20 - http_handlers.MAX_WAITING)
        gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
        assert min(gaps) == pytest.approx(http_handlers.SPACING_SECONDS)
        await ask()
        assert len(times) == http_handlers.MAX_WAITING + 2

    virtual_time.run(run())
