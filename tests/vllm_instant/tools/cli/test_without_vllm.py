"""The commands in an environment without vLLM, as on the machine of a plugin author or of a client."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import bare_environment
import pytest
from fake_server import FakeServer, serving

NEEDS_VLLM = "needs vLLM, which is not installed here: pip install 'vllm-instant[gpu]'"


@pytest.fixture(scope="session")
def bare(tmp_path_factory):
    return bare_environment.build(tmp_path_factory.mktemp("bare") / "environment")


@pytest.fixture(scope="session")
def with_loadtest(tmp_path_factory):
    return bare_environment.build(tmp_path_factory.mktemp("loadtest") / "environment", extra="loadtest")


def _succeeds(result):
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    return result.stdout


@pytest.mark.parametrize("module", ["vllm", "torch", "triton", "fastapi", "transformers", "locust", "sklearn"])
def test_the_environment_has_none_of_the_optional_packages(bare, module):
    assert "ModuleNotFoundError" in bare.run_python("-c", f"import {module}").stderr


_HELP_OF_ALL = """
import typer.main
from vllm_instant.tools.cli import app
command = typer.main.get_command(app)
for name in command.commands:
    command([name, "--help"], standalone_mode=False)
command(["--help"], standalone_mode=False)
"""


def test_help_of_everything(bare):
    shown = _succeeds(bare.run_python("-c", _HELP_OF_ALL))
    for name in ("config", "plugins", "explain", "bench", "loadtest", "doctor", "distill", "experts"):
        assert f"│ {name} " in shown
        assert f"{name} [OPTIONS]" in shown
    assert "Usage: " in _succeeds(bare.run("--help"))


def test_the_installed_script_starts(bare):
    code = "from importlib.metadata import entry_points as e; e(group='console_scripts', name='vllm-instant')"
    code += "['vllm-instant'].load()(['plugins'])"
    assert "goodput" in _succeeds(bare.run_python("-c", code))


def test_deployment_files_are_written_checked_and_shown(bare, tmp_path):
    path = tmp_path / "deploy.toml"
    assert f"Wrote {path}" in _succeeds(bare.run("config", "init", path))
    assert "ok (speculation=goodput" in _succeeds(bare.run("config", "check", path))
    assert "speculation.plugin" in _succeeds(bare.run("config", "show", path))


def test_a_table_for_vllm_is_not_checked_and_that_is_said(bare, tmp_path):
    path = tmp_path / "deploy.toml"
    path.write_text("[vllm]\nmax_num_seqs = 3\n")
    result = bare.run("config", "check", path)
    assert result.returncode == 0
    assert result.stderr == "vLLM is not installed here: the [vllm] table was not checked\n"


def test_every_plugin_is_listed(bare):
    shown = _succeeds(bare.run("plugins"))
    assert "similarity" in shown
    assert "fp8_fused" in shown


@pytest.fixture
def decisions() -> Iterator[str]:
    """The address of a server that has decided nothing."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            body = json.dumps({"engines": [{"engine": 0, "decisions": []}]}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_running_server_is_asked_for_its_decisions(bare, decisions):
    assert "no decisions" in _succeeds(bare.run("explain", "--url", decisions))


def test_running_servers_are_compared(bare, tmp_path):
    with serving(FakeServer()) as stock, serving(FakeServer()) as ours:
        words = ["--stock", stock, "--stock-again", stock, "--ours", ours, "--no-quality"]
        quick = ["--concurrency", "1", "--rounds", "3", "--tokens", "4"]
        result = bare.run("bench", *words, *quick, "--output", tmp_path / "result")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "result.html").exists()


def test_doctor_checks_the_sources_of_a_vllm_that_is_not_installed(bare, newest_release):
    result = bare.run("doctor", "--vllm", newest_release)
    assert result.returncode == 0, result.stderr
    assert "scheduler" in result.stdout
    assert "does not fit" not in result.stdout


def test_load_tests_name_the_extra_that_they_need(bare):
    result = bare.run("loadtest", "--list")
    assert result.returncode == 2
    assert result.stderr == (
        "vllm-instant: loadtest needs Locust, aiohttp and geventhttpclient: pip install 'vllm-instant[loadtest]'\n"
    )


def test_load_tests_run_with_their_extra(with_loadtest, tmp_path):
    assert "kv-squeeze" in _succeeds(with_loadtest.run("loadtest", "--list"))
    result = with_loadtest.run("loadtest", "steady", "--output", tmp_path / "run")
    assert result.returncode == 2
    assert f"loadtest without --url {NEEDS_VLLM}" in result.stderr


@pytest.mark.parametrize(
    ("words", "needed"),
    [
        ("doctor", f"doctor {NEEDS_VLLM}"),
        ("demo", f"demo {NEEDS_VLLM}"),
        ("demo serve", f"demo serve {NEEDS_VLLM}"),
        ("calibrate MODEL", f"calibrate {NEEDS_VLLM}"),
        ("verify MODEL", f"verify MODEL {NEEDS_VLLM}"),
        ("bench MODEL", f"bench MODEL {NEEDS_VLLM}"),
        ("experts trace MODEL", f"experts trace {NEEDS_VLLM}"),
        ("demo models", "demo models needs PyTorch and Transformers: pip install 'vllm-instant[distill]'"),
        ("demo moe", "demo moe needs PyTorch and Transformers: pip install 'vllm-instant[distill]'"),
        ("demo train OUT", "demo train needs PyTorch and Transformers: pip install 'vllm-instant[distill]'"),
        ("demo train-moe OUT", "demo train-moe needs PyTorch and Transformers: pip install 'vllm-instant[distill]'"),
        ("distill MODEL OUT", "distill needs PyTorch, Transformers and Accelerate: pip install"),
        ("experts learn X -o Y", "experts learn needs scikit-learn: pip install 'vllm-instant[experts]'"),
        ("experts report X -o Y", "experts report needs Matplotlib, PyTorch and Transformers: pip install"),
    ],
)
def test_the_other_commands_say_in_one_sentence_what_they_need(bare, words, needed):
    result = bare.run(*words.split())
    assert result.returncode == 2
    assert result.stderr.startswith(f"vllm-instant: {needed}")
    assert len(result.stderr.splitlines()) == 1
