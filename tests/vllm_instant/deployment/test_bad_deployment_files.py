"""Bad deployment files: one clear sentence each, exit code 2, never a traceback."""

import subprocess
import sys
from pathlib import Path

import pytest

GOOD_NGRAM = '[drafter]\nplugin = "ngram"\nnum_speculative_tokens = 2\n'

# name: (content, words that the sentence must have)
FILES = {
    "unknown table": ('[speculaton]\nplugin = "off"\n', ["[speculaton]", "did you mean speculation"]),
    "table that is no table": ("speculation = 3\n", ["speculation", "must be a table", "3"]),
    "wrong key": (
        '[speculation]\nplugin = "fixed"\nnum_draft_token = 3\n',
        ["num_draft_token", "did you mean num_draft_tokens"],
    ),
    "wrong type": (
        '[speculation]\nplugin = "fixed"\nnum_draft_tokens = "four"\n',
        ["num_draft_tokens", "whole number", '"four"'],
    ),
    "number in quotes": (
        '[speculation]\nplugin = "fixed"\nnum_draft_tokens = "4"\n',
        ["num_draft_tokens", "whole number"],
    ),
    "fraction": ('[speculation]\nplugin = "fixed"\nmax_batch_size = 1.5\n', ["max_batch_size", "whole number", "1.5"]),
    "goal that is none": ("[speculation]\nitl_slo_ms = 0\n", ["[speculation] itl_slo_ms", "0"]),
    "option of fixed without its name": (
        "[speculation]\nnum_draft_tokens = 3\n",
        ["[speculation] num_draft_tokens", "is an option of fixed, not of goodput"],
    ),
    "out of bounds": ("[drafter]\nplugin = 'ngram'\nnum_speculative_tokens = 0\n", ["num_speculative_tokens", "0"]),
    "unknown plugin": ('[speculation]\nplugin = "fixd"\n', ["[speculation] plugin", "fixd", "did you mean fixed"]),
    "plugin that is no name": ("[speculation]\nplugin = true\n", ["[speculation] plugin", "name of a plugin", "true"]),
    "plugin of another slot": ('[batching]\nplugin = "ngram"\n', ["[batching] plugin", "ngram", "fcfs"]),
    "option of a plugin not selected": (
        '[drafter]\nplugin = "ngram"\nmodel = "x"\n',
        ["[drafter] model", "is an option of hybrid and model, not of ngram"],
    ),
    "options below the plugin's name": (
        '[speculation]\nplugin = "fixed"\n[speculation.fixed]\nnum_draft_tokens = 3\n',
        ["[speculation]", "stand directly in [speculation]"],
    ),
    "missing option": ('[drafter]\nplugin = "model"\n', ["[drafter] model", "needs this option"]),
    "wrong choice": (
        '[drafter]\nplugin = "model"\nmodel = "m"\nmethod = "telepathy"\n',
        ["method", "draft_model", "telepathy"],
    ),
    "missing draft model": ('[drafter]\nplugin = "model"\nmodel = "./nowhere"\n', ["./nowhere", "config.json"]),
    "two drafters": (
        GOOD_NGRAM + '[vllm]\nspeculative_config = { method = "ngram", num_speculative_tokens = 2 }\n',
        ["[drafter]", "[vllm] speculative_config", "keep one"],
    ),
    "more drafts than the drafter makes": (
        GOOD_NGRAM + '[speculation]\nplugin = "fixed"\nnum_draft_tokens = 9\n',
        ["num_draft_tokens = 9", "more than the 2"],
    ),
    "bounds out of order": (
        '[drafter]\nplugin = "ngram"\nprompt_lookup_min = 5\nprompt_lookup_max = 2\n',
        ["prompt_lookup_min = 5", "prompt_lookup_max = 2"],
    ),
    "foreign scheduler": ('[vllm]\nscheduler_cls = "a.B"\n', ["[vllm] scheduler_cls", "speculation"]),
    "not TOML": ("[speculation\nplugin = 1\n", ["not valid TOML", "line 1"]),
    "key twice": ("[vllm]\ndtype = 'half'\ndtype = 'half'\n", ["not valid TOML"]),
    "option of a plugin without options": ("[batching]\nmagic = 3\n", ["[batching] magic", "no options"]),
    "plugin whose import fails": (
        '[speculation]\nplugin = "broken"\n',
        ["broken", "broken-plugin", "could not be loaded", "ModuleNotFoundError", "not_installed_anywhere"],
    ),
    "budget beyond everything": (
        '[experts]\nplugin = "super_expert"\nbudget = 1.5\n',
        ["[experts] budget", "less than or equal to 1", "1.5"],
    ),
}

# Only vLLM's own parser knows these, which takes long to load.
ENGINE_ARGUMENTS = {
    "unknown engine argument": ("[vllm]\nmax_num_seq = 3\n", ["[vllm] max_num_seq", "did you mean max_num_seqs"]),
    "engine argument of the wrong type": ('[vllm]\nmax_num_seqs = "many"\n', ["[vllm] max_num_seqs", "many"]),
    "switch that is no switch": ('[vllm]\nenforce_eager = "yes"\n', ["[vllm] enforce_eager", "true or false"]),
    "choice that vLLM does not have": ('[vllm]\ndtype = "float7"\n', ["[vllm] dtype", "float7"]),
}


@pytest.fixture(scope="module")
def folder_with_broken_plugin(plugin_folder: Path) -> Path:
    info = plugin_folder / "broken_plugin-1.0.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken-plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[vllm_instant]\nbroken = broken_plugin\n")
    (plugin_folder / "broken_plugin.py").write_text("import not_installed_anywhere\n")
    return plugin_folder


def _check(file: Path, plugins: Path) -> subprocess.CompletedProcess[str]:
    """Run the real command in a process of its own, as a user would."""
    import os

    return subprocess.run(
        [sys.executable, "-m", "vllm_instant.tools.cli", "config", "check", str(file)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(plugins), os.environ.get("PYTHONPATH", "")])},
        check=False,
    )


def _assert_one_clear_error(result: subprocess.CompletedProcess[str], file: Path, words: list[str]) -> None:
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stdout + result.stderr
    sentences = [line for line in result.stderr.splitlines() if line.startswith("vllm-instant: ")]
    assert len(sentences) == 1, result.stderr
    assert str(file) in sentences[0]
    for word in words:
        assert word in sentences[0]


def _marks(name: str) -> list[pytest.MarkDecorator]:
    return [pytest.mark.engine, *([] if name == "unknown engine argument" else [pytest.mark.nightly])]


@pytest.mark.parametrize("name", [*FILES, *(pytest.param(name, marks=_marks(name)) for name in ENGINE_ARGUMENTS)])
def test_one_clear_error(name, tmp_path, folder_with_broken_plugin):
    content, words = {**FILES, **ENGINE_ARGUMENTS}[name]
    file = tmp_path / "deploy.toml"
    file.write_text(content)
    _assert_one_clear_error(_check(file, folder_with_broken_plugin), file, words)


def test_there_are_at_least_twenty():
    assert len(FILES) >= 20


def test_missing_file(tmp_path, plugin_folder):
    file = tmp_path / "deploy.toml"
    _assert_one_clear_error(_check(file, plugin_folder), file, ["there is no such file"])


def test_folder_instead_of_a_file(tmp_path, plugin_folder):
    _assert_one_clear_error(_check(tmp_path, plugin_folder), tmp_path, ["this is a folder"])


def test_unreadable_file(tmp_path, plugin_folder):
    file = tmp_path / "deploy.toml"
    file.symlink_to(file)  # a loop cannot be opened, not even by root
    _assert_one_clear_error(_check(file, plugin_folder), file, ["cannot be read"])


def test_binary_file(tmp_path, plugin_folder):
    file = tmp_path / "deploy.toml"
    file.write_bytes(b"\xff\xfe\x00model")
    _assert_one_clear_error(_check(file, plugin_folder), file, ["not UTF-8"])


@pytest.mark.parametrize("plugin", ["model", "hybrid"])
class TestDraftModels:
    """A draft model that is named by its path."""

    def _check(self, plugin, folder, tmp_path, plugin_folder, words):
        file = tmp_path / "deploy.toml"
        file.write_text(f'[drafter]\nplugin = "{plugin}"\nmodel = "{folder}"\n')
        _assert_one_clear_error(_check(file, plugin_folder), file, words)

    def test_missing(self, plugin, tmp_path, plugin_folder):
        self._check(plugin, tmp_path / "gone", tmp_path, plugin_folder, ["is not a folder with a config.json"])

    def test_configuration_that_is_no_json(self, plugin, tmp_path, plugin_folder):
        (tmp_path / "config.json").write_text("{")
        self._check(plugin, tmp_path, tmp_path, plugin_folder, ["config.json cannot be read"])

    def test_weights_cut_short(self, plugin, tmp_path, plugin_folder, demo_pair):
        for path in demo_pair.draft.iterdir():
            (tmp_path / path.name).write_bytes(path.read_bytes())
        weights = next(tmp_path.glob("*.safetensors"))
        weights.write_bytes(weights.read_bytes()[:-100])
        self._check(plugin, tmp_path, tmp_path, plugin_folder, [weights.name, "is damaged"])
