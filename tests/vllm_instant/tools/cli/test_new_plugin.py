"""What ``vllm-instant new-plugin`` writes works as it is."""

import subprocess
import sys

import bare_environment
import pytest
from typer.testing import CliRunner

from vllm_instant.tools.cli import app


def _install(environment, folder):
    """Install a folder in place; no index is needed, as all its dependencies are there."""
    words = ["install", "-q", "-e", folder, "--no-deps", "--no-build-isolation"]
    subprocess.run([sys.executable, "-m", "pip", "--python", environment.python, *words], check=True)


@pytest.mark.parametrize(
    ("kind", "needed"),
    [("drafter", []), ("speculation", []), ("rejection_sampler", ["torch"])],
    ids=lambda value: value,
)
def test_a_new_plugin_is_installed_listed_and_passes_its_tests(kind, needed, tmp_path):
    environment = bare_environment.build(tmp_path / "environment", also=["setuptools", "pytest", *needed])
    folder = tmp_path / "mine"
    written = environment.run("new-plugin", kind, "my_own", "--output", folder)
    assert written.returncode == 0, written.stderr
    assert sorted(path.name for path in folder.iterdir()) == ["my_own.py", "pyproject.toml", "test_my_own.py"]

    _install(environment, folder)
    listed = [line.split()[:4] for line in environment.run("plugins").stdout.splitlines()]
    assert [kind, "my_own", "my-own", "0.1.0"] in listed
    tested = environment.run_python("-m", "pytest", "-q", "-p", "no:cacheprovider", folder)
    assert tested.returncode == 0, tested.stdout

    if kind == "drafter":
        text = tmp_path / "text.txt"
        text.write_text("to be or not to be, that is the question. " * 40)
        tried = environment.run("try-drafter", "my_own", "--text", text)
        assert tried.returncode == 0, tried.stderr
        assert [line.split()[0] for line in tried.stdout.splitlines()[1:4]] == ["my_own", "suffix", "ngram"]


@pytest.fixture
def new_plugin(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return lambda *words: CliRunner().invoke(app, ["new-plugin", *words])


def test_it_says_what_to_do_next(new_plugin, tmp_path):
    result = new_plugin("drafter", "my_drafter")
    assert result.exit_code == 0
    assert result.output.splitlines()[-4:] == [
        "Next:",
        "  pip install -e 'my_drafter[test]'",
        "  pytest my_drafter",
        "  vllm-instant try-drafter my_drafter --text FILE",
    ]
    assert "class MyDrafter(Drafter)" in (tmp_path / "my_drafter/my_drafter.py").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["drafter", "My-Drafter"], "should be lower-case letters, digits and underscores"),
        (["drafter", "1st"], "should be lower-case letters"),
        (["drafter", "class"], "should be lower-case letters"),
        (["drafter", "suffix"], "a drafter with the name suffix is installed already"),
        (["drafter", "json"], "json is the name of a module that is installed already"),
        (["drafter", "mine", "--output", "full"], "full exists already; give a new folder with --output"),
    ],
)
def test_a_name_or_folder_that_cannot_be_used(new_plugin, tmp_path, words, message):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    result = new_plugin(*words)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


def test_an_unknown_kind(new_plugin):
    assert "drafter" in new_plugin("tokenizer", "mine").stderr
