"""The options of ``remote``, and what it refuses before a model is loaded."""

import ssl

import pytest
from draft_servers import ServerThread, answering, hello, wait_until

from vllm_instant import PluginContext
from vllm_instant.deployment.deployment_env import get_deployment
from vllm_instant.deployment.errors import DeploymentError
from vllm_instant.deployment.resolved import drafter_arguments
from vllm_instant.deployment.settings import resolve
from vllm_instant.remote.protocol import TOKEN_VARIABLE, VERSION, Hello
from vllm_instant_plugins.remote import plugin
from vllm_instant_plugins.remote.plugin import RemoteOptions, build


def context(**changes):
    properties = {"model": "m", "max_model_len": 64, "max_num_seqs": 2, "vocab_size": 100, "device": "cpu"}
    return PluginContext(**{**properties, "num_speculative_tokens": 4, **changes})


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ("", "[drafter] remote needs url, or client_drafts = true"),
        ('url = "http://draft:1"', "[drafter] url must be wss://HOST:PORT or ws://HOST:PORT, found http://draft"),
        ('url = "ws://me:secret@draft:1"', "[drafter] url must be wss://HOST:PORT or ws://HOST:PORT, found ws://draft"),
        ('url = "ws://draft:1"', "without encryption: use wss://, or set allow_unencrypted = true"),
    ],
)
def test_mistakes_are_one_sentence_before_a_model_is_loaded(write_file, options, sentence):
    with pytest.raises(DeploymentError) as caught:
        resolve(write_file(f'[drafter]\nplugin = "remote"\n{options}\n'))
    assert sentence in str(caught.value)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "options",
    [
        "client_drafts = true",
        'url = "wss://draft"',
        'url = "ws://127.0.0.1:1"',
        'url = "ws://d:1"\nallow_unencrypted = true',
    ],
)
def test_what_is_accepted(write_file, options):
    deployment = resolve(write_file(f'[drafter]\nplugin = "remote"\n{options}\n'))
    assert drafter_arguments(deployment)["speculative_config"]["num_speculative_tokens"] == 8
    assert get_deployment() is None


def test_the_token_comes_from_a_file_or_the_environment(monkeypatch, tmp_path):
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    assert plugin._token(RemoteOptions()) is None
    monkeypatch.setenv(TOKEN_VARIABLE, "of the environment")
    assert plugin._token(RemoteOptions()) == "of the environment"
    assert plugin._token(RemoteOptions(token="of the deployment")) == "of the deployment"
    file = tmp_path / "token"
    file.write_text("of the file\nmore\n")
    assert plugin._token(RemoteOptions(token="t", token_file=str(file))) == "of the file"
    with pytest.raises(ValueError, match="token_file cannot be read"):
        plugin._token(RemoteOptions(token_file=str(tmp_path / "none")))


def test_tls_verifies_the_server(tmp_path):
    found = plugin._ssl_context(RemoteOptions(url="wss://draft"))
    assert (found.verify_mode, found.check_hostname) == (ssl.CERT_REQUIRED, True)
    assert plugin._ssl_context(RemoteOptions(url="ws://draft")) is None
    with pytest.raises(ValueError, match="ca_file cannot be read"):
        plugin._ssl_context(RemoteOptions(url="wss://draft", ca_file=str(tmp_path / "none")))


@pytest.mark.parametrize(("parallel", "refused"), [("2x1x1x1", True), ("1x1x1x2", True), ("1x1x4x1", False)])
def test_an_engine_with_several_workers_is_refused(parallel, refused):
    of_engine = context(identity={"parallel": parallel})
    if refused:
        with pytest.raises(ValueError, match="remote needs an engine with one worker"):
            build(RemoteOptions(client_drafts=True), of_engine)
    else:
        assert build(RemoteOptions(client_drafts=True, fallback="suffix"), of_engine)._fallback is not None


def test_a_draft_server_with_another_tokenizer_stops_the_start(demo_pair):
    async def greet(socket):
        await hello(socket, Hello(VERSION, "another", 100))
        await socket.wait_closed()

    tokenizer = str(demo_pair.target)
    with ServerThread(greet) as server, pytest.raises(ValueError, match=r"cannot be used: the tokenizers differ"):
        build(RemoteOptions(url=server.url), context(tokenizer=tokenizer))
    with ServerThread(answering(lambda tokens: [])) as server:
        drafter = build(RemoteOptions(url=server.url), context(tokenizer=tokenizer))
        wait_until(lambda: drafter._source.num_connections == 1)
        drafter._source.close()
