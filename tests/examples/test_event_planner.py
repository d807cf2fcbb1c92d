"""The event planner: its page in a headless browser, its parts alone, and that it is short."""

import asyncio
import json
import re
import shutil
import socket
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import uvicorn
from fastapi.testclient import TestClient

from vllm_instant.deployment.settings import resolve

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "event_planner"
BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
ANSWER = json.dumps(
    {name: [f"{name} one", f"{name} two"] for name in ("guests", "dishes", "music", "itinerary", "toasts")}
)


@pytest.fixture(scope="module")
def planner():
    sys.path.insert(0, str(FOLDER))
    try:
        import app

        yield app
    finally:
        sys.path.remove(str(FOLDER))
        sys.modules.pop("app", None)


class FakeWish:
    """A server whose answer is fixed, and which remembers what it was sent."""

    texts: list[str] = []  # noqa: RUF012

    def __init__(self, server, model):
        pass

    async def open(self):
        return None

    async def close(self):
        return None

    async def update(self, text):
        self.texts.append(text)

    async def answer(self, text):
        self.texts.append(f"plan {text}")
        end = 60 if "forbidden" in text else len(ANSWER)
        for start in range(0, end, 8):
            yield {"choices": [{"delta": {"content": ANSWER[start : min(start + 8, end)]}}]}
            await asyncio.sleep(0.001)
        yield {"choices": [{"delta": {}, "finish_reason": "content_filter" if "forbidden" in text else "stop"}]}


@pytest.fixture
def application(planner, tmp_path):
    FakeWish.texts = []
    kinds = {"typed": FakeWish, "whole": FakeWish}
    return planner.create_app("http://nowhere", "demo", tmp_path / "rsvps.sqlite", "a notice", kinds)


def test_it_is_short():
    assert sum(len(path.read_text().splitlines()) for path in FOLDER.iterdir() if path.is_file()) < 500


def test_its_deployment_file_is_valid():
    deployment = resolve(FOLDER / "deploy.toml")
    assert (deployment.slots["guard"].plugin, deployment.slots["streaming"].plugin) == ("rules", "chunked")


def test_fields_of_an_unfinished_plan(planner):
    assert planner.fields_of('{"guests": ["An') == {"guests": ["An"]}
    assert planner.fields_of('{"guests": ["Ann"], "dishes": [') == {"guests": ["Ann"], "dishes": []}
    assert planner.fields_of('{"gue') == {}
    assert planner.fields_of("no json") == {}


def test_only_changes_of_a_wish_are_sent(planner, monkeypatch):
    sent = []

    class Session:
        def __init__(self, *_, **__):
            pass

        async def append(self, text):
            sent.append(("append", text))

        async def replace(self, start, end, text):
            sent.append(("replace", start, end, text))

    monkeypatch.setattr(planner, "StreamingSession", Session)
    wish = planner.Typed("http://nowhere", "demo")
    for text in ("a gar", "a garden", "a garage party", "a garage party"):
        asyncio.run(wish.update(text))
    assert sent == [("append", "a gar"), ("append", "den"), ("replace", 5, None, "age party")]


def test_rsvps_are_kept(application):
    client = TestClient(application)
    assert client.get("/rsvps").json() == []
    client.post("/rsvps", json={"guest": "Ann", "coming": True})
    found = client.post("/rsvps", json={"guest": "Ann", "coming": False}).json()
    assert found == [{"guest": "Ann", "coming": False}]
    assert client.post("/rsvps", json={"guest": "  ", "coming": True}).status_code == 422
    assert client.delete("/rsvps/Bob").status_code == 404
    assert client.delete("/rsvps/Ann").json() == []


def test_a_server_that_is_not_there_is_named(planner, tmp_path):
    app = planner.create_app("http://127.0.0.1:9", "demo", tmp_path / "rsvps.sqlite")
    with TestClient(app).websocket_connect("/wish?kind=whole") as connection:
        connection.send_json({"plan": "x"})
        assert "error" in connection.receive_json()


@contextmanager
def served(application):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(application, host="127.0.0.1", port=port, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(10)


def test_the_page_in_a_browser(application):
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    browser = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if browser is None:
        pytest.skip(f"no browser is installed ({', '.join(BROWSERS)})")
    with served(application) as url, playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        try:
            page = chromium.new_page()
            problems = []
            page.on("pageerror", lambda error: problems.append(str(error)))
            page.goto(url)
            playwright.expect(page.locator(".notice").first).to_have_text("a notice")
            playwright.expect(page.locator("#status")).to_have_text("ready")
            page.locator("#wish").press_sequentially("A garden party")
            page.locator("#go").click()
            for name in ("guests", "dishes", "music", "itinerary", "toasts"):
                playwright.expect(page.locator(f"#{name} li")).to_have_text([f"{name} one", f"{name} two"])
            playwright.expect(page.locator("#status")).to_contain_text(re.compile(r"first field after \d+ ms"))
            playwright.expect(page.locator("#stopped")).to_be_hidden()
            assert "A gard" in FakeWish.texts
            assert FakeWish.texts[-1] == "plan A garden party"
            page.locator("#wish").fill("something forbidden")
            page.locator("#typed").uncheck()
            playwright.expect(page.locator("#status")).to_have_text("ready")
            page.locator("#go").click()
            playwright.expect(page.locator("#stopped")).to_be_visible()
            playwright.expect(page.locator("#toasts li")).to_have_count(0)
            page.locator("#guest").fill("Ann")
            page.locator("#form button").click()
            playwright.expect(page.locator("#rsvps")).to_contain_text("Ann is coming")
            page.locator("#rsvps button").click()
            playwright.expect(page.locator("#rsvps li")).to_have_count(0)
            assert problems == []
        finally:
            chromium.close()
