"""The demo's table and arguments; the whole demo is run by `make demo`."""

import pytest
from rich.console import Console
from typer.testing import CliRunner

from vllm_instant.deployment.settings import resolve
from vllm_instant.tools.cli import app
from vllm_instant.tools.demo import assets, moe_assets, session
from vllm_instant.tools.measure.token_stream import StreamedAnswer


def _answer(speed, ttft):
    return StreamedAnswer("x", [(ttft, 1), (ttft + 10 / speed, 11)])


def test_the_table_shows_medians_ratios_and_acceptance():
    result = session.Result(
        session.TASKS[0],
        [_answer(10, 0.2), _answer(30, 0.1), _answer(20, 0.3)],
        [_answer(40, 0.1), _answer(40, 0.1), _answer(50, 0.4)],
        accepted=30,
        proposed=40,
    )
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(session._table([result]))
    text = console.export_text()
    for word in ("200 ms", "20.0", "100 ms", "40.0 (2.00×)", "30 of 40 (75%)"):
        assert word in text


def test_both_servers_get_the_same_engine_arguments(demo_pair):
    words = session.our_arguments(demo_pair)
    overrides = [words[i + 1] for i, word in enumerate(words) if word == "--instant-set"]
    deployment = resolve(session.DEPLOYMENT, overrides)
    assert deployment.slots["drafter"].options["model"] == str(demo_pair.draft)
    stock = session.shared_arguments()
    for key, value in deployment.vllm.items():
        option = f"--{key.replace('_', '-')}"
        assert option in stock
        if value is not True:
            assert stock[stock.index(option) + 1] == str(value)


def test_a_missing_asset_is_one_sentence(monkeypatch, capsys, tmp_path):
    def gone():
        raise FileNotFoundError("the demo models are missing: no x")

    monkeypatch.setattr(assets, "prepare", gone)
    assert session.compare() == 1
    assert "the demo models are missing" in capsys.readouterr().out


def test_an_interrupt_ends_in_order(monkeypatch, capsys):
    def interrupt():
        raise KeyboardInterrupt

    monkeypatch.setattr(assets, "prepare", interrupt)
    assert session.compare() == 130
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
