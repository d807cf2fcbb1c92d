"""``vllm-instant experts learn`` and ``report``."""

import json

import numpy as np
import pytest
from expert_traces import planted
from typer.testing import CliRunner

from vllm_instant.moe.expert_groups import SuperExperts
from vllm_instant.tools.cli import app


@pytest.fixture
def run(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    return lambda *words: CliRunner().invoke(app, ["experts", *map(str, words)])


@pytest.fixture
def traces(tmp_path):
    paths = []
    for number in range(2):
        trace, _ = planted(requests=20, seed=0)
        paths.append(tmp_path / f"{number}.npz")
        trace.write(paths[-1])
    return paths


def test_learn_writes_clusters_placement_and_the_tables_of_eplb(run, traces, tmp_path):
    output = tmp_path / "clusters.json"
    result = run("learn", *traces, "-o", output, "--eplb", tmp_path / "eplb", "--devices", "2,4")
    assert result.exit_code == 0, result.output
    assert "of 40 requests" in result.stdout
    assert "4 super-experts per layer: experts of one cluster are picked together" in result.stdout
    assert "prompt classes (even, odd) differ in" in result.stdout
    found = SuperExperts.read(output)
    assert found.clusters == (4, 4)
    assert set(found.placement) == {2, 4}
    assert found.learned_from["placement"][0]["saved"][0] > 0.1
    table = np.load(tmp_path / "eplb" / "physical_to_logical_4.npy")
    assert (np.sort(table, 1) == np.arange(32)).all()


def test_learn_says_when_there_is_nothing_to_learn(run, tmp_path):
    planted(loyalty=0.25)[0].write(tmp_path / "random.npz")
    result = run("learn", tmp_path / "random.npz", "-o", tmp_path / "c.json", "--clusters", 4)
    assert result.exit_code == 0
    assert "no structure" in result.stdout
    assert SuperExperts.read(tmp_path / "c.json").learned_from["structured"] is False


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--devices", "3"), "32 experts cannot be placed on 3 devices equally"),
        (("--devices", "two"), "--devices takes whole numbers with commas between them, found 'two'"),
        (("--clusters", "33"), "33 clusters of 32 experts: valid are 1 to 32"),
    ],
)
def test_what_learn_cannot_do_is_one_sentence(run, traces, tmp_path, words, said):
    result = run("learn", *traces, "-o", tmp_path / "c.json", *words)
    assert result.exit_code == 2
    assert said in result.stderr


def test_report_of_a_folder_without_a_model(run, tmp_path):
    result = run("report", tmp_path, "-o", tmp_path / "r")
    assert result.exit_code == 2
    assert f"{tmp_path} cannot be loaded" in result.stderr


def test_learn_without_a_trace(run, tmp_path):
    result = run("learn", tmp_path / "none.npz", "-o", tmp_path / "c.json")
    assert result.exit_code == 2
    assert result.stderr.startswith("vllm-instant: there is no trace")


def test_report_measures_draws_and_writes(run, tmp_path):
    text = tmp_path / "notes.txt"
    text.write_text("def f(x):\n    return x + 1\n" * 400)
    output = tmp_path / "out" / "report"
    options = ("--windows", 8, "--batch", 4, "--context", 32, "--prompt", 8, "--budgets", "24,12")
    result = run("report", "demo", "--text", f"notes={text}", *options, "-o", output)
    assert result.exit_code == 0, result.output
    assert "6 layers of 64 experts, 8 per token" in result.stdout
    record = json.loads(output.with_suffix(".json").read_text())
    budgets = {point["budget"]: point for point in record["points"] if point["form"] == "budget"}
    assert budgets[12]["distinct"][0] < budgets[24]["distinct"][0] <= 24
    assert budgets[12]["kl"][0] > budgets[24]["kl"][0]
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("demo", "--prompt", "255"), "--prompt 255 leaves nothing of a --context of 256: at most 252"),
        (("demo", "--windows", "20"), "--windows 20 must be a multiple of --batch (16)"),
        (("demo", "--clusters", "none.json"), "there is no cluster file none.json"),
        (("demo", "--windows", "16000"), "tokens are too few for"),
    ],
)
def test_what_report_cannot_do_is_one_sentence(run, tmp_path, words, said):
    result = run("report", *words, "-o", tmp_path / "r")
    assert result.exit_code == 2
    assert said in result.stderr
