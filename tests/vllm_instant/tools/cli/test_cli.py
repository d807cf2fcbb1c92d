"""The ``vllm-instant`` command, in this process."""

import tomllib

import pytest
from typer.testing import CliRunner

from vllm_instant.deployment.settings import resolve
from vllm_instant.deployment.slots import SLOTS
from vllm_instant.patches import registry
from vllm_instant.tools.cli import app


@pytest.fixture
def run(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")

    def invoke(*words):
        return CliRunner().invoke(app, [str(word) for word in words])

    return invoke


class TestConfig:
    def test_init_writes_a_file_that_is_the_defaults(self, run, tmp_path):
        path = tmp_path / "deploy.toml"
        assert run("config", "init", path).exit_code == 0
        deployment = resolve(path)
        assert deployment.slots == resolve().slots
        assert deployment.vllm == {}
        assert list(tomllib.loads(path.read_text())) == [*SLOTS, "vllm"]

    def test_init_shows_every_option_of_every_plugin(self, run, tmp_path):
        path = tmp_path / "deploy.toml"
        run("config", "init", path)
        text = path.read_text()
        for word in (
            "num_draft_tokens",
            "max_batch_size",
            "prompt_lookup_max",
            "draft_sample_method",
            "model = ... (required)",
        ):
            assert word in text

    def test_every_commented_option_is_accepted_when_uncommented(self, run, tmp_path):
        path = tmp_path / "deploy.toml"
        run("config", "init", path)
        lines = path.read_text().replace('# plugin = "suffix"', 'plugin = "ngram"', 1).splitlines()
        chosen = [line.removeprefix("# ") if "prompt_lookup" in line else line for line in lines]
        path.write_text("\n".join(chosen))
        assert resolve(path).slots["drafter"].options["prompt_lookup_max"] == 4

    def test_init_does_not_overwrite(self, run, tmp_path):
        path = tmp_path / "deploy.toml"
        path.write_text("mine")
        result = run("config", "init", path)
        assert result.exit_code == 2
        assert "--force overwrites" in result.stderr
        assert path.read_text() == "mine"
        assert run("config", "init", path, "--force").exit_code == 0

    def test_init_into_nowhere(self, run, tmp_path):
        result = run("config", "init", tmp_path / "gone" / "deploy.toml")
        assert result.exit_code == 2
        assert "cannot be written" in result.stderr

    def test_show_says_where_each_value_came_from(self, run, write_file, monkeypatch):
        monkeypatch.setenv("INSTANT_SPECULATION__PLUGIN", "fixed")
        monkeypatch.setenv("INSTANT_SPECULATION__MAX_BATCH_SIZE", "8")
        path = write_file('[drafter]\nplugin = "ngram"\n[vllm]\nmax_num_seqs = 3\n')
        lines = run("config", "show", path, "--set", "speculation.num_draft_tokens=2").stdout.splitlines()
        shown = {line.split()[0]: line for line in lines}
        assert str(path) in shown["drafter.plugin"]
        assert "default" in shown["drafter.prompt_lookup_max"]
        assert "environment variable INSTANT_SPECULATION__MAX_BATCH_SIZE" in shown["speculation.max_batch_size"]
        assert "--instant-set" in shown["speculation.num_draft_tokens"]
        assert str(path) in shown["vllm.max_num_seqs"]
        assert "[drafter]" in shown["vllm.speculative_config"]

    @pytest.mark.engine
    def test_check_of_a_good_file(self, run, write_file):
        result = run("config", "check", write_file("[vllm]\nmax_num_seqs = 3\n"))
        assert result.exit_code == 0
        assert "ok (speculation=goodput" in result.stdout


@pytest.mark.usefixtures("with_test_plugins")
def test_plugins_one_line_each(run):
    lines = run("plugins").stdout.splitlines()
    [line] = [line for line in lines if " bigram " in line]
    assert line.split()[:5] == ["drafter", "bigram", "bigram-plugin", "1.0", "lossless"]
    [line] = [line for line in lines if " incomplete " in line]
    assert line.split()[4] == "lossy"
    assert len(lines) == 1 + sum(1 for line in lines[1:] if line.split()[0] in SLOTS)


class TestDoctor:
    @pytest.mark.engine
    def test_everything_fits_here(self, run, write_file):
        result = run("doctor", "--config", write_file('[drafter]\nplugin = "ngram"\n'))
        assert result.exit_code == 0
        for patch in registry.PATCHES:
            assert f"{patch.name} " in result.stdout
        [line] = [line for line in result.stdout.splitlines() if line.startswith("scheduler ")]
        assert "ok" in line
        assert "speculation=goodput" in line

    @pytest.fixture
    def other_vllm(self, tmp_path):
        """A vLLM whose scheduler lacks a method that the patches wrap."""
        from vllm_instant.patches.compat import installed_vllm

        for path in installed_vllm().rglob("*.py"):
            relative = path.relative_to(installed_vllm())
            if any(str(relative) == r.file for patch in registry.PATCHES for r in patch.requirements):
                copy = tmp_path / relative
                copy.parent.mkdir(parents=True, exist_ok=True)
                copy.write_text(path.read_text().replace("def _update_after_schedule", "def _after_schedule"))
        return tmp_path

    def test_a_configured_plugin_that_cannot_work(self, run, write_file, other_vllm):
        result = run("doctor", "--vllm", other_vllm, "--config", write_file('[drafter]\nplugin = "ngram"\n'))
        assert result.exit_code == 1
        assert "has no Scheduler._update_after_schedule" in result.stdout
        assert "A chosen plugin cannot work" in result.stderr

    def test_a_patch_that_no_plugin_needs_may_be_unsupported(self, run, other_vllm):
        result = run("doctor", "--vllm", other_vllm)
        assert result.exit_code == 0
        assert "has no Scheduler._update_after_schedule" in result.stdout

    def test_a_folder_that_is_no_vllm(self, run, tmp_path):
        result = run("doctor", "--vllm", tmp_path)
        assert result.exit_code == 2
        assert "is not a vllm package folder" in result.stderr

    def test_a_pretended_device_needs_a_model(self, run):
        result = run("doctor", "--pretend-device", "h100")
        assert result.exit_code == 2
        assert "--pretend-device needs --model" in result.stderr

    def test_a_server_refuses_what_the_doctor_would(self, write_file, other_vllm, monkeypatch):
        from vllm_instant.deployment.errors import DeploymentError
        from vllm_instant.patches import activation

        monkeypatch.setattr(registry, "installed_vllm", lambda: other_vllm)
        activation_calls = []
        monkeypatch.setattr(activation, "activate", lambda: activation_calls.append(1))
        with pytest.raises(DeploymentError, match="patch scheduler: does not fit vLLM"):
            activation.serve(resolve(write_file('[drafter]\nplugin = "ngram"\n')))
        assert activation_calls == []

    def test_a_newer_version_that_all_patches_fit_only_warns(self, monkeypatch, caplog):
        from vllm_instant.deployment import deployment_env
        from vllm_instant.patches import activation

        monkeypatch.setenv(deployment_env.VARIABLE, "")
        monkeypatch.setenv("VLLM_RAY_EXTRA_ENV_VARS_TO_COPY", "")
        monkeypatch.setattr(registry, "installed_version", lambda: "0.99.0")
        monkeypatch.setattr(activation, "activate", lambda: None)
        activation.serve(resolve())
        assert "vLLM 0.99.0 is outside of the range" in caplog.text
        assert deployment_env.get_deployment() is not None


def test_demo_text_writes_every_document_once_and_keeps_what_is_held_out_apart(run, tmp_path):
    from vllm_instant.tools.demo.corpus import documents

    assert run("demo", "text", tmp_path).exit_code == 0
    expected = {
        ("held_out" if d.held_out else "training", d.kind, d.name.replace("/", ".").removesuffix(".py")): d.text
        for d in documents()
    }
    found = {
        (path.parent.parent.name, path.parent.name, path.stem): path.read_text(encoding="utf-8")
        for path in tmp_path.rglob("*.*")
        if path.is_file()
    }
    assert found == expected
