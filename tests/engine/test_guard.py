"""The guard's last two paths with a real engine: batch files, and prompts that are judged while they are typed."""

import asyncio
import json
import os
import re
import subprocess
import sys

import httpx
import pytest
from asking import COMMON

from vllm_instant.streaming.client import StreamingSession
from vllm_instant.tools.measure.servers import serving_environment

WORDS = ["project bluebird"]
GUARD = f'[guard]\nplugin = "rules"\nwords = {json.dumps(WORDS)}\nmessage = "[removed]"\n'
STREAMING = '[streaming]\nplugin = "chunked"\n'
CLEAN = "def add(a, b):\n    return a + b\n\n\ndef sub(a, b):\n"
FORBIDDEN = f"{CLEAN}# of Project  Bluebird\n"
REQUEST = {"model": "demo", "temperature": 0, "max_tokens": 24}


def _messages(text):
    return [{"role": "user", "content": text}]


@pytest.fixture(scope="module")
def server(launch):
    with launch(GUARD + STREAMING) as running:
        yield running


@pytest.fixture(scope="module")
def answer(server):
    """The answer to the clean prompt."""
    body = {**REQUEST, "messages": _messages(CLEAN)}
    [choice] = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=120).json()["choices"]
    return choice["message"]["content"]


async def _typed(url, *edits):
    """Type, with a pause after each edit, and return the text of the answer and why it ended."""
    text, reason = "", None
    async with StreamingSession(url, **REQUEST) as session:
        for edit, *arguments in edits:
            await getattr(session, edit)(*arguments)
            await asyncio.sleep(0.5)
        async for part in session.commit():
            for choice in part["choices"]:
                text += choice["delta"].get("content") or ""
                reason = choice["finish_reason"] or reason
    return text, reason


@pytest.mark.nightly
def test_a_typed_prompt_is_judged_as_it_is_when_it_is_sent(server, answer):
    at = FORBIDDEN.index("#")
    typed = asyncio.run(_typed(server.url, ("append", CLEAN[:20]), ("append", CLEAN[20:])))
    kept = asyncio.run(_typed(server.url, ("append", FORBIDDEN[: at + 10]), ("append", FORBIDDEN[at + 10 :])))
    edited = asyncio.run(_typed(server.url, ("append", FORBIDDEN), ("replace", at, None, "")))
    assert typed == (answer, "length")
    assert kept == ("[removed]", "content_filter")
    assert edited == (answer, "length")


@pytest.mark.nightly
def test_the_answers_in_a_batch_file_are_judged(server, answer, demo_pair, tmp_path):
    """``vllm run-batch``, which has no server: the guard comes with the deployment."""
    asked, answered, file = (tmp_path / name for name in ("asked.jsonl", "answered.jsonl", "deploy.toml"))
    word = next(found for found in re.findall(r"\w{2,}", answer) if found.lower() not in FORBIDDEN.lower())
    file.write_text(GUARD.replace(json.dumps(WORDS), json.dumps([*WORDS, word])))
    texts = {"clean": "x = 1", "prompt": FORBIDDEN, "answer": CLEAN}
    line = {"method": "POST", "url": "/v1/chat/completions"}
    asked.write_text(
        "\n".join(
            json.dumps({**line, "custom_id": name, "body": {**REQUEST, "messages": _messages(text)}})
            for name, text in texts.items()
        )
    )
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "run-batch", "-i", str(asked), "-o", str(answered)]
    command += ["--model", str(demo_pair.target), "--served-model-name", "demo", *COMMON]
    command += ["--plugins", "vllm_instant", "--instant-config", str(file)]
    done = subprocess.run(
        command, env={**os.environ, **serving_environment()}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    choices = {}
    for found in map(json.loads, answered.read_text().splitlines()):
        [choices[found["custom_id"]]] = found["response"]["body"]["choices"]
    assert choices["clean"]["finish_reason"] == "length"
    assert choices["prompt"]["message"]["content"] == "[removed]"
    before = re.split(rf"\b{word}\b", answer, maxsplit=1)[0]
    assert choices["answer"]["message"]["content"] == before + "[removed]"
    assert {choices[name]["finish_reason"] for name in ("prompt", "answer")} == {"content_filter"}
