"""One mask for secrets, and a canary in every input that must show in no output."""

import asyncio
import json
import types

import httpx
import pytest
from fake_server import FakeServer, serving
from typer.testing import CliRunner

from vllm_instant.deployment.secrets import MASK, is_secret, masked, masked_text, masked_words
from vllm_instant.deployment.settings import resolve
from vllm_instant.tools.bench.arms import arm_commands
from vllm_instant.tools.bench.plan import BASELINE
from vllm_instant.tools.cli import app
from vllm_instant.tools.measure import interleaved_rounds, server_info
from vllm_instant.tools.measure.servers import Server

CANARY = "sk-live-CANARY"
DEPLOYMENT = f"""
[vllm]
api_key = ["{CANARY}-1", "{CANARY}-2"]
hf_token = "{CANARY}-3"
ssl_keyfile = "/keys/{CANARY}"
max_num_seqs = 3
otlp_traces_endpoint = "http://user:{CANARY}@collector"
"""


@pytest.mark.parametrize(
    "key",
    ["api_key", "--api-key", "api-keys", "vllm.hf_token", "HF_TOKEN", "ssl_keyfile", "db_password", "Authorization"],
)
def test_keys_of_secrets(key):
    assert is_secret(key)


@pytest.mark.parametrize(
    "key", ["max_tokens", "history_tokens", "tokenizer", "token_seconds", "model", "kv_bytes_per_token"]
)
def test_keys_of_other_values(key):
    assert not is_secret(key)


def test_values_keep_their_shape():
    assert masked({"api_key": ["a", "b"], "hf_token": None, "nested": [{"password": "x", "n": 1}], "model": "m"}) == {
        "api_key": [MASK, MASK],
        "hf_token": None,
        "nested": [{"password": MASK, "n": 1}],
        "model": "m",
    }


def test_words_of_a_command_line():
    words = ["serve", "m", "--api-key", "a", "b", "--port", "1", "--hf-token=c", "--url", "ours=http://u:p@h:1/v1"]
    words += ["--instant-set=vllm.api_key=d", "vllm.hf_token=e"]
    assert masked_words(words) == [
        *("serve", "m", "--api-key", MASK, MASK, "--port", "1", f"--hf-token={MASK}", "--url"),
        *(f"ours=http://{MASK}@h:1/v1", f'--instant-set=vllm.api_key="{MASK}"', f"vllm.hf_token={MASK}"),
    ]


@pytest.mark.parametrize(
    "text",
    [
        DEPLOYMENT,
        f'[vllm]\n"api_key" = "{CANARY}"\n',
        f"[vllm]\napi_key = [\n  '{CANARY}',\n]\n",
        f'vllm.hf_token = "a \\" {CANARY}"',
        f"# --instant-set vllm.api_key={CANARY}",
        f'{{"hf_token": "{CANARY}"}}',
    ],
)
def test_texts_of_deployment_files(text):
    shown = masked_text(text)
    assert "CANARY" not in shown
    assert MASK in shown
    assert shown.count("\n") >= text.count("\n") - 2


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "deploy.toml"
    path.write_text(DEPLOYMENT)
    return path


def test_config_show(file, monkeypatch):
    monkeypatch.setenv("COLUMNS", "250")
    result = CliRunner().invoke(app, ["config", "show", str(file)])
    assert result.exit_code == 0, result.output
    assert "vllm.max_num_seqs" in result.output
    assert "CANARY" not in result.output


@pytest.mark.engine
def test_the_route_of_the_deployment(file):
    from vllm_instant.patches.http_handlers import show_deployment

    state = types.SimpleNamespace(instant_deployment=resolve(file))
    shown = asyncio.run(show_deployment(types.SimpleNamespace(app=types.SimpleNamespace(state=state))))
    assert shown["vllm"]["max_num_seqs"] == 3
    assert shown["vllm"]["api_key"] == [MASK, MASK]
    assert "CANARY" not in json.dumps(shown)


def test_what_bench_writes_about_servers_that_it_starts(file):
    words = ["--api-key", f"{CANARY}-typed"]
    commands = arm_commands("m", file, [f"vllm.hf_token={CANARY}-set"], {}, words)
    assert "max-num-seqs 3" in commands.deployments[BASELINE]
    assert "CANARY" not in json.dumps(commands.setup())


def test_every_file_and_output_of_bench(tmp_path, monkeypatch):
    monkeypatch.setattr(interleaved_rounds, "settle", lambda: None)
    with serving(FakeServer()) as baseline, serving(FakeServer()) as ours:
        urls = [url.replace("http://", f"http://user:{CANARY}@") for url in (baseline, ours)]
        words = ["bench", "--baseline", urls[0], "--ours", urls[1], "--api-key", CANARY, "--no-quality"]
        words += ["--concurrency", "1", "--rounds", "3", "--tokens", "4", "--output", str(tmp_path / "result")]
        monkeypatch.setattr("sys.argv", ["vllm-instant", *words])
        result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    written = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert sorted(written) == ["result.html", "result.json"]
    assert "--api-key" in written["result.json"]
    assert "CANARY" not in result.output
    assert not [name for name, text in written.items() if "CANARY" in text]


def test_explain_does_not_repeat_the_key(monkeypatch):
    monkeypatch.setattr(server_info, "get", lambda *_, **__: httpx.Response(401))
    result = CliRunner().invoke(app, ["explain", "--api-key", CANARY])
    assert result.exit_code == 2
    assert "CANARY" not in result.output


def test_started_servers_get_secrets_by_their_environment(tmp_path):
    words = ["--api-key", f"{CANARY}-1", f"{CANARY}-2", "--max-num-seqs", "3", f"--hf-token={CANARY}-3"]
    words += [f"--instant-set=vllm.api_key={CANARY}-4", "--instant-set=drafter.plugin=ngram"]
    server = Server("m", words, log=tmp_path / "log")
    assert "CANARY" not in " ".join(server.command)
    assert server.command[3:6] == ["--max-num-seqs", "3", "--instant-set=drafter.plugin=ngram"]
    assert server._environment == {
        "VLLM_API_KEY": f"{CANARY}-1",
        "HF_TOKEN": f"{CANARY}-3",
        "INSTANT_VLLM__API_KEY": f"{CANARY}-4",
    }


def test_child_processes_get_no_secrets(write_file, monkeypatch):
    import os

    from vllm_instant.deployment import deployment_env

    monkeypatch.setenv(deployment_env.VARIABLE, "")
    monkeypatch.setenv("VLLM_RAY_EXTRA_ENV_VARS_TO_COPY", "")
    file = write_file('[vllm]\napi_key = ["CANARY"]\nhf_token = "CANARY"\nmax_num_seqs = 4\n')
    deployment_env.set_deployment(resolve(file))
    assert "CANARY" not in os.environ[deployment_env.VARIABLE]
    assert deployment_env.get_deployment().vllm["max_num_seqs"] == 4
