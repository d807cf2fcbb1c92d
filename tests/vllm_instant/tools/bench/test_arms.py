"""The command lines of the servers that a bench starts."""

import pytest

from vllm_instant.tools.bench.arms import arm_commands
from vllm_instant.tools.bench.plan import BASELINE, BASELINE_AGAIN, OURS
from vllm_instant.tools.measure.servers import Server


@pytest.fixture(autouse=True)
def _no_key(monkeypatch):
    monkeypatch.delenv("VLLM_API_KEY", raising=False)


def _file(folder, name, text):
    file = folder / name
    file.write_text(text)
    return file


def _value(words, option):
    """The value that a parser ends up with: the last one."""
    return [words[i + 1] for i, word in enumerate(words[:-1]) if word == option][-1]


def test_the_baseline_gets_the_engine_arguments_and_each_deployment_its_file(tmp_path):
    file = _file(tmp_path, "a.toml", '[vllm]\nmax_model_len = 512\n\n[drafter]\nplugin = "suffix"\n')
    commands = arm_commands("some/model", file, ["vllm.max_num_seqs=4"], {}, ["--seed", "7"]).words
    assert (
        commands[BASELINE]
        == commands[BASELINE_AGAIN]
        == [
            "--max-model-len",
            "512",
            "--max-num-seqs",
            "4",
            "--seed",
            "7",
        ]
    )
    assert commands[OURS][:2] == ["--seed", "7"]
    assert _value(commands[OURS], "--instant-config") == str(file)
    assert "--instant-set=vllm.max_num_seqs=4" in commands[OURS]


def test_one_eager_deployment_makes_all_arms_eager(tmp_path):
    eager = _file(tmp_path, "eager.toml", "[vllm]\nenforce_eager = true\n")
    commands = arm_commands("some/model", None, [], {"other": str(eager)}, []).words
    assert all("--enforce-eager" in words for words in commands.values())
    plain = arm_commands("some/model", None, [], {}, []).words
    assert not any("--enforce-eager" in words for words in plain.values())


def test_a_production_file_with_address_and_key_can_be_measured(tmp_path):
    """Every server listens where the bench looks for it, and requests carry the file's key."""
    file = _file(tmp_path, "prod.toml", '[vllm]\nport = 8000\nhost = "10.0.0.1"\napi_key = "secret"\n')
    commands = arm_commands("some/model", file, [], {}, [])
    for words in commands.words.values():
        server = Server("some/model", words, log=tmp_path / "log")
        assert (_value(server.command, "--host"), _value(server.command, "--port")) == ("127.0.0.1", str(server.port))
    assert commands.headers == {"Authorization": "Bearer secret"}


def test_the_key_is_not_in_the_saved_result(tmp_path):
    file = _file(tmp_path, "prod.toml", '[vllm]\napi_key = "secret"\n')
    assert "secret" not in str(arm_commands("some/model", file, [], {}, []).deployments)
