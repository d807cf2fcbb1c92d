"""Values as users write them: in files from any editor, in environment variables, on the command line."""

import math

import pytest

from vllm_instant.deployment.config_sources import read_environment, read_file, read_overrides
from vllm_instant.deployment.errors import DeploymentError
from vllm_instant.deployment.settings import resolve

FILE = '[speculation]\r\nplugin = "off"\r\n'


@pytest.mark.parametrize("raw", [FILE.encode(), b"\xef\xbb\xbf" + FILE.encode()], ids=["crlf", "byte order mark"])
def test_a_file_of_a_windows_editor_is_read(tmp_path, raw):
    path = tmp_path / "deploy.toml"
    path.write_bytes(raw)
    assert resolve(path).slots["speculation"].plugin == "off"


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (FILE.encode("utf-16"), "is not UTF-8 text"),
        (b"a = " + b"[" * 5000 + b"]" * 5000, "nested too deeply"),
        (b"[vllm]\nseed = " + b"9" * 5000, "not valid TOML"),
        (
            b"[vllm]\nrevision = 2024-01-01\n",
            r'\[vllm\] revision: expected .*found a date or time: quote it, "2024-01-01"',
        ),
        (b"[vllm]\nmiddleware = [12:30:00]\n", r'\[vllm\] middleware: .*quote it, "12:30:00"'),
        (b"[speculation]\nitl_slo_ms = inf\n", r"\[speculation\] itl_slo_ms: expected a finite number, found inf"),
        (b"[vllm.hf_overrides]\nrope_theta = nan\n", r"\[vllm\] hf_overrides.rope_theta: expected a finite number"),
    ],
    ids=["utf-16", "nested", "huge number", "date", "time in a list", "infinity", "not a number"],
)
def test_a_file_that_cannot_be_used_is_refused_in_one_sentence(tmp_path, raw, message):
    path = tmp_path / "deploy.toml"
    path.write_bytes(raw)
    with pytest.raises(DeploymentError, match=message) as caught:
        read_file(path)
    assert len(caught.value.problems) == 1


@pytest.mark.parametrize(
    ("variable", "text", "message"),
    [
        ("INSTANT_SPECULATION", "off", r"without a key; write INSTANT_SPECULATION__PLUGIN=off"),
        ("INSTANT_DRAFTER", "ngram", r"without a key; write INSTANT_DRAFTER__PLUGIN=ngram"),
        ("INSTANT_VLLM", "max_num_seqs=8", r"without a key; write INSTANT_VLLM__KEY=VALUE"),
        ("INSTANT_VLLM__", "8", r"names no key of \[vllm\]; expected INSTANT_VLLM__KEY"),
    ],
)
def test_a_variable_without_a_key_is_refused_by_name(monkeypatch, variable, text, message):
    monkeypatch.setenv(variable, text)
    with pytest.raises(DeploymentError, match=rf"environment variable {variable}: .*{message}"):
        resolve()


def test_an_empty_variable_named_like_a_table_sets_nothing(monkeypatch):
    monkeypatch.setenv("INSTANT_BATCHING", "")
    assert read_environment().tables == {}


@pytest.mark.parametrize(
    "text", ['{"plugin": "fixed", "num_draft_tokens": 1}', '{plugin = "fixed", num_draft_tokens = 1}']
)
def test_a_variable_may_hold_a_whole_table_and_its_keys_override_it(monkeypatch, text):
    monkeypatch.setenv("INSTANT_SPECULATION", text)
    monkeypatch.setenv("INSTANT_SPECULATION__NUM_DRAFT_TOKENS", "3")
    deployment = resolve()
    assert deployment.slots["speculation"].plugin == "fixed"
    assert deployment.slots["speculation"].options["num_draft_tokens"] == 3
    assert deployment.origins["speculation.plugin"] == "environment variable INSTANT_SPECULATION"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("8", 8),
        ("0.9", 0.9),
        ("true", True),
        ('"8"', "8"),
        ("7e12345", "7e12345"),
        ("1234e3", "1234e3"),
        ("0x1F", "0x1F"),
        ("1_000", "1_000"),
        ("0123", "0123"),
        ("12#34", "12#34"),
        ("2024-01-01", "2024-01-01"),
        ("inf", "inf"),
        ("1\nx = 2", "1\nx = 2"),
        ('["a", "b"]', ["a", "b"]),
        ('{"method": "ngram"}', {"method": "ngram"}),
        ("[" * 5000, "[" * 5000),
    ],
)
def test_an_engine_argument_outside_a_file_reaches_vllm_as_it_is_written(monkeypatch, text, value):
    monkeypatch.setenv("INSTANT_VLLM__REVISION", text)
    assert read_environment().tables == {"vllm": {"revision": value}}
    assert read_overrides([f"vllm.revision={text}"]).tables == {"vllm": {"revision": value}}


@pytest.mark.parametrize(("text", "value"), [("1e3", 1000.0), ("7e12345", "7e12345"), ("0x1F", "0x1F"), ("-2", -2)])
def test_numbers_in_nested_engine_arguments_are_those_of_json(text, value):
    found = read_overrides([f"vllm.hf_overrides.rope_theta={text}"]).tables["vllm"]["hf_overrides"]["rope_theta"]
    assert found == value
    assert not isinstance(found, float) or math.isfinite(found)


@pytest.mark.parametrize("name", ["7e12345", "0x1F", "1234567", "1234e3", "true", "2024-01-01", "inf", "12#34"])
def test_a_string_option_takes_a_text_that_looks_like_another_type(monkeypatch, name):
    monkeypatch.setenv("INSTANT_DRAFTER__MODEL", f"org/{name}")
    monkeypatch.setenv("INSTANT_DRAFTER__PLUGIN", "model")
    assert resolve().slots["drafter"].options["model"] == f"org/{name}"
    assert resolve(None, [f"drafter.model={name}"]).slots["drafter"].options["model"] == name


def test_a_number_option_takes_every_spelling_of_a_finite_number(monkeypatch):
    assert resolve(None, ["speculation.itl_slo_ms=5e1"]).slots["speculation"].options["itl_slo_ms"] == 50.0
    with pytest.raises(DeploymentError, match=r"itl_slo_ms: expected a number, found \"inf\""):
        resolve(None, ["speculation.itl_slo_ms=inf"])


@pytest.mark.parametrize(
    ("pairs", "tables"),
    [
        (["vllm.a=5", "vllm.a.b=1"], {"vllm": {"a": {"b": 1}}}),
        (["vllm.a.b=1", "vllm.a=5"], {"vllm": {"a": 5}}),
        (["vllm.a={b = 1, c = 2}", "vllm.a.b=3"], {"vllm": {"a": {"b": 3, "c": 2}}}),
        (['vllm.a={"b": 1}', "vllm.a.b=3"], {"vllm": {"a": {"b": 3}}}),
    ],
)
def test_of_a_table_and_its_keys_the_later_override_wins(pairs, tables):
    assert read_overrides(pairs).tables == tables


def test_a_variable_for_a_key_below_a_value_replaces_the_value(monkeypatch):
    monkeypatch.setenv("INSTANT_VLLM__A", "5")
    monkeypatch.setenv("INSTANT_VLLM__A__B", "1")
    assert read_environment().tables == {"vllm": {"a": {"b": 1}}}


def test_a_home_folder_is_expanded_in_every_source(write_file, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("INSTANT_CONFIG", "~/deploy.toml")
    monkeypatch.setenv("INSTANT_VLLM__TOKENIZER", "~/tokenizer")
    write_file(
        '[vllm]\ndownload_dir = "~/models"\nmiddleware = ["~/a", "b~/c"]\nspeculative_config.model = "~/draft"\n'
    )
    deployment = resolve(None, ["vllm.model=~/target"])
    assert deployment.file == str(tmp_path / "deploy.toml")
    assert deployment.vllm == {
        "download_dir": f"{tmp_path}/models",
        "middleware": [f"{tmp_path}/a", "b~/c"],
        "speculative_config": {"model": f"{tmp_path}/draft"},
        "tokenizer": f"{tmp_path}/tokenizer",
        "model": f"{tmp_path}/target",
    }
