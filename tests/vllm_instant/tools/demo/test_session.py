"""The demo's table and arguments; the whole demo is run by `make demo`."""

import re
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from vllm_instant.deployment.settings import resolve
from vllm_instant.tools.cli import app
from vllm_instant.tools.demo import assets, moe_assets, real_model, session, setups
from vllm_instant.tools.measure.token_stream import StreamedAnswer


def _answer(speed, ttft):
    return StreamedAnswer("x", [(ttft, 1), (ttft + 10 / speed, 11)])


def test_the_table_shows_medians_ratios_and_acceptance():
    result = session.Result(
        setups.EMBEDDED_TASKS[0],
        [_answer(10, 0.2), _answer(30, 0.1), _answer(20, 0.3)],
        [_answer(40, 0.1), _answer(40, 0.1), _answer(50, 0.4)],
        accepted=30,
        proposed=40,
    )
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(session._table([result]))
    text = console.export_text()
    for word in ("200 ms", "20.0", "100 ms", "40.0 (2.00×)", "30 of 40 (75%)", "3 of 3"):
        assert word in text


def test_different_answers_are_counted():
    answers = [_answer(10, 0.1) for _ in range(4)]
    answers[3].text = "another"
    assert session.Result(setups.EMBEDDED_TASKS[0], answers[:2], answers[2:], 0, 0).equal == 1


@pytest.fixture
def real_setup(monkeypatch, tmp_path):
    monkeypatch.setattr(real_model, "prepare", lambda: tmp_path)
    return setups.real()


def test_both_servers_get_the_same_engine_arguments(demo_pair, monkeypatch, real_setup):
    monkeypatch.setattr(assets, "prepare", lambda: demo_pair)
    for setup in (setups.embedded(), real_setup):
        words = setup.our_arguments()
        overrides = [words[i + 1] for i, word in enumerate(words) if word == "--instant-set"]
        deployment = resolve(setup.deployment, overrides)
        baseline = setup.baseline_arguments()
        for key, value in deployment.vllm.items():
            option = f"--{key.replace('_', '-')}"
            assert option in baseline
            if value is not True:
                assert baseline[baseline.index(option) + 1] == str(value)


def test_both_servers_get_the_asked_number_format(real_setup):
    setup, _ = setups.chosen(is_embedded=False, dtype="float32")
    for words in (setup.baseline_arguments(), setup.our_arguments()):
        assert words[words.index("--dtype") + 1] == "float32"
    assert "float32" in session.conditions(setup, 2)
    assert "--dtype" not in real_setup.our_arguments()


def test_the_embedded_setup_names_its_draft_model(demo_pair, monkeypatch):
    monkeypatch.setattr(assets, "prepare", lambda: demo_pair)
    assert setups.embedded().overrides == [f"drafter.model={demo_pair.draft}"]


def test_the_real_prompts_fit_the_template_and_the_model(real_setup):
    assert len(real_setup.tasks) == 3
    for task in real_setup.tasks:
        assert task.prompt.endswith("<|im_end|>\n<|im_start|>assistant\n")
        assert task.shown.strip() in task.prompt
    [structured] = [task.parameters for task in real_setup.tasks if task.parameters]
    assert set(structured["response_format"]["json_schema"]["schema"]["required"]) == {"what", "when", "where", "who"}


def test_without_the_package_the_embedded_models_stand_in_and_a_sentence_says_so(demo_pair, monkeypatch):
    monkeypatch.setattr(real_model, "PACKAGE", "no-such-distribution")
    monkeypatch.setattr(assets, "prepare", lambda: demo_pair)
    setup, note = setups.chosen(is_embedded=False)
    assert setup.model == demo_pair.target
    assert note.startswith(f"{real_model.NAME} is not installed: pip install gguf")
    assert setups.chosen(is_embedded=True) == (setup, "")


def test_another_file_than_the_expected_one_is_refused(monkeypatch, tmp_path):
    class Installed:
        def locate_file(self, name):
            return tmp_path / "model.gguf"

    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(real_model.importlib.metadata, "distribution", lambda name: Installed())
    monkeypatch.setattr(real_model.importlib.util, "find_spec", lambda name: name)
    with pytest.raises(ValueError, match=r"model\.gguf: the SHA-256 checksum is [0-9a-f]{64}, expected b179c952"):
        real_model.stored()


def test_a_missing_model_is_one_sentence(monkeypatch, capsys, tmp_path):
    def gone():
        raise FileNotFoundError("the demo models are missing: no x")

    monkeypatch.setattr(assets, "prepare", gone)
    assert session.compare(is_embedded=True) == 1
    assert "the demo models are missing" in capsys.readouterr().out


def test_an_interrupt_ends_in_order(monkeypatch, capsys):
    def interrupt():
        raise KeyboardInterrupt

    monkeypatch.setattr(assets, "prepare", interrupt)
    assert session.compare(is_embedded=True) == 130
    assert "both servers are stopped" in capsys.readouterr().out


def test_without_the_repository_the_message_names_the_remedy(tmp_path):
    with pytest.raises(FileNotFoundError, match="not part of the installed package; clone the repository and run"):
        assets.prepare(tmp_path / "output", assets=tmp_path / "nowhere")


@pytest.mark.parametrize("words", [["demo", "models"], ["demo", "moe"], ["bench", "demo"]])
def test_commands_say_in_one_sentence_that_the_models_are_missing(words, tmp_path, monkeypatch):
    def prepare(*args, **kwargs):
        return assets.stored(tmp_path / "nowhere")

    monkeypatch.setattr(assets, "prepare", prepare)
    monkeypatch.setattr(moe_assets, "prepare", prepare)
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 2
    assert result.stderr.strip() == f"vllm-instant: {_message(tmp_path)}"


def _message(folder):
    with pytest.raises(FileNotFoundError) as raised:
        assets.stored(folder / "nowhere")
    return str(raised.value)


def test_make_env_installs_the_package_that_the_message_names():
    script = (Path(__file__).resolve().parents[4] / "tools/make_env.py").read_text()
    [pinned] = re.findall(r'DEMO_MODEL = "(.*)"', script)
    assert pinned.startswith(f"{real_model.PACKAGE}==")
    assert real_model.INSTALL.endswith(f"--no-deps {pinned}")


def test_serving_replaces_the_process_by_a_server_with_the_deployment(demo_pair, monkeypatch):
    monkeypatch.setattr(assets, "prepare", lambda: demo_pair)
    started = []
    monkeypatch.setattr(session.os, "execve", lambda path, words, environment: started.append(words))
    session.serve(8123, is_embedded=True)
    [words] = started
    assert words[words.index("--port") + 1] == "8123"
    assert words[words.index("--instant-config") + 1] == str(setups.DEPLOYMENT)
    assert str(demo_pair.target) in words
