"""Selection on vLLM's real parser: every way to write it, every precedence."""

import argparse
import json
import os
import subprocess
import sys

import pytest

from vllm_instant.deployment import deployment_env
from vllm_instant.deployment.resolved import is_default_drafter
from vllm_instant.patches import activation, flags
from vllm_instant.patches.names import QUALIFIED_NAME as SCHEDULER

pytestmark = pytest.mark.engine

NGRAM = '[drafter]\nplugin = "ngram"\nnum_speculative_tokens = 3\n'


@pytest.fixture(scope="module")
def parser():
    activation.offer_flags()
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    top = FlexibleArgumentParser(prog="vllm")
    ServeSubcommand().subparser_init(top.add_subparsers(dest="subparser"))
    return top


@pytest.fixture
def parse(parser, monkeypatch):
    """Parse a line as ``vllm`` would; what it publishes is taken back afterwards."""
    for name in (deployment_env.VARIABLE, "VLLM_PLUGINS", "VLLM_RAY_EXTRA_ENV_VARS_TO_COPY"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)

    def run(*words) -> argparse.Namespace:
        monkeypatch.setattr(sys, "argv", ["vllm", *map(str, words)])
        return parser.parse_args()

    return run


@pytest.fixture
def deploy(write_file):
    return write_file(NGRAM + "[vllm]\nmax_num_seqs = 5\nmax_model_len = 256\nenable_prefix_caching = false\n")


def _assert_selected(parsed, seqs=5):
    assert parsed.model_tag == "MODEL"
    assert parsed.max_num_seqs == seqs
    assert parsed.max_model_len == 256
    assert parsed.enable_prefix_caching is False
    assert parsed.speculative_config["num_speculative_tokens"] == 3
    assert parsed.scheduler_cls == SCHEDULER
    assert deployment_env.get_deployment().slots["drafter"].plugin == "ngram"
    assert "vllm_instant" in os.environ["VLLM_PLUGINS"].split(",")


@pytest.mark.parametrize(
    "line",
    [
        "serve MODEL --plugins vllm_instant --instant-config FILE",
        "serve MODEL --plugins=vllm_instant --instant-config=FILE",
        "serve --plugins vllm_instant MODEL --instant-config FILE",
        "serve --instant-config FILE --plugins vllm_instant MODEL --served-model-name a",
        "serve MODEL --plugins other,vllm_instant --instant_config FILE",
        "serve MODEL --plugins other --plugins vllm_instant --instant-config FILE",
        "serve --plugins vllm_instant --instant-config FILE --model MODEL",
    ],
)
def test_every_spelling_selects(parse, deploy, line):
    _assert_selected(parse(*line.replace("FILE", str(deploy)).split()))


def test_several_names_all_reach_the_children(parse, deploy):
    parse("serve", "MODEL", "--plugins", "a,vllm_instant", "--plugins", "b", "--instant-config", deploy)
    assert os.environ["VLLM_PLUGINS"] == "a,vllm_instant,b"


def test_selection_by_environment(parse, deploy, monkeypatch):
    monkeypatch.setenv("VLLM_PLUGINS", "vllm_instant")
    monkeypatch.setenv("INSTANT_CONFIG", str(deploy))
    _assert_selected(parse("serve", "MODEL"))


@pytest.mark.parametrize("plugins", ["vllm_instant", "[other, vllm_instant]"])
def test_selection_in_vllms_yaml_file(parse, deploy, tmp_path, plugins):
    yaml = tmp_path / "vllm.yaml"
    yaml.write_text(f"plugins: {plugins}\ninstant-config: {deploy}\n")
    _assert_selected(parse("serve", "MODEL", "--config", yaml))


def test_command_line_over_yaml_over_deployment_file(parse, deploy, tmp_path):
    yaml = tmp_path / "vllm.yaml"
    yaml.write_text("max-num-seqs: 6\n")
    selection = ("--plugins", "vllm_instant", "--instant-config", deploy)
    _assert_selected(parse("serve", "MODEL", *selection), 5)
    _assert_selected(parse("serve", "MODEL", "--config", yaml, *selection), 6)
    _assert_selected(parse("serve", *selection, "MODEL", "--config", yaml), 6)
    _assert_selected(parse("serve", "MODEL", "--config", yaml, *selection, "--max-num-seqs", "7"), 7)


@pytest.mark.parametrize("option", ["--speculative-config", "-sc"])
def test_one_key_of_a_table_can_be_overridden(parse, deploy, option):
    parsed = parse(
        "serve", "MODEL", "--plugins", "vllm_instant", "--instant-config", deploy, f"{option}.prompt_lookup_max=9"
    )
    assert parsed.speculative_config == {
        "method": "ngram",
        "num_speculative_tokens": 3,
        "prompt_lookup_min": 2,
        "prompt_lookup_max": 9,
    }


def test_a_whole_table_on_the_command_line_replaces_ours(parse, deploy):
    other = {"method": "ngram", "num_speculative_tokens": 8}
    parsed = parse("serve", "MODEL", "--plugins", "vllm_instant", "--instant-config", deploy, "-sc", json.dumps(other))
    assert parsed.speculative_config == other


def test_an_alias_on_the_command_line_wins(parse, write_file):
    file = write_file("[vllm]\ntensor_parallel_size = 4\n")
    parsed = parse("serve", "MODEL", "--plugins", "vllm_instant", "--instant-config", file, "-tp", "2")
    assert parsed.tensor_parallel_size == 2


def test_the_deployment_file_may_name_the_model(parse, write_file):
    file = write_file('[vllm]\nmodel = "from-file"\n')
    selection = ("--plugins", "vllm_instant", "--instant-config", file)
    assert parse("serve", *selection).model_tag == "from-file"
    assert parse("serve", "MODEL", *selection).model_tag == "MODEL"


def test_one_value_set_on_the_command_line(parse, deploy):
    selection = ("--plugins", "vllm_instant", "--instant-config", deploy)
    parsed = parse("serve", "MODEL", *selection, "--instant-set", "speculation.plugin=off")
    assert parsed.speculative_config is None
    assert parsed.scheduler_cls is None


def test_without_a_file_the_defaults_are_served(parse):
    parsed = parse("serve", "MODEL", "--plugins", "vllm_instant")
    assert deployment_env.get_deployment().file is None
    assert is_default_drafter(deployment_env.get_deployment())
    # Whether the default drafter then drafts depends on the model.
    assert parsed.scheduler_cls == SCHEDULER
    assert parsed.speculative_config is None


def test_who_brings_a_scheduler_gets_no_default_drafter(parse):
    parsed = parse("serve", "MODEL", "--plugins", "vllm_instant", "--scheduler-cls", "theirs.Scheduler")
    assert parsed.scheduler_cls == "theirs.Scheduler"


@pytest.mark.parametrize(("scheduler", "served"), [(None, SCHEDULER), ("theirs.Scheduler", "theirs.Scheduler")])
def test_streaming_sets_the_scheduler_unless_another_one_is_named(parse, write_file, scheduler, served):
    file = write_file('[speculation]\nplugin = "off"\n[streaming]\nplugin = "resumable"\n')
    words = ["--scheduler-cls", scheduler] if scheduler else []
    parsed = parse("serve", "MODEL", "--plugins", "vllm_instant", "--instant-config", str(file), *words)
    assert parsed.scheduler_cls == served
    assert parsed.speculative_config is None


def test_a_speculative_method_on_the_command_line_replaces_the_default_drafter(parse):
    config = '{"method": "ngram", "num_speculative_tokens": 3}'
    parsed = parse("serve", "MODEL", "--plugins", "vllm_instant", "-sc", config)
    assert parsed.speculative_config == {"method": "ngram", "num_speculative_tokens": 3}
    assert parsed.scheduler_cls == SCHEDULER


def test_without_selection_nothing_happens(parse, monkeypatch):
    monkeypatch.setenv(deployment_env.VARIABLE, "left over from a parent process")
    parsed = parse("serve", "MODEL")
    assert parsed.scheduler_cls is None
    assert deployment_env.VARIABLE not in os.environ
    assert "VLLM_PLUGINS" not in os.environ


def test_lists_that_vllm_parses_for_itself_change_nothing(parse, parser, deploy):
    parse("serve", "MODEL", "--plugins", "vllm_instant", "--instant-config", deploy)
    parser.parse_args(["serve", "MODEL"])
    assert deployment_env.get_deployment().slots["drafter"].plugin == "ngram"


LISTS = {
    "allowed_origins": ('["http://localhost:3000", "https://chat.example"]', None),
    "allowed_methods": ('["GET"]', None),
    "allowed_headers": ("[]", None),
    "middleware": ('["a.b.First", "a.b.Second"]', None),
    "served_model_name": ('["first", "second"]', None),
    "api_key": ('["first", "second"]', None),
    "lora_modules": ('[{ name = "sql", path = "/adapters/sql" }]', [("sql", "/adapters/sql")]),
    "disable_access_log_for_endpoints": ('["/health", "/metrics"]', "/health,/metrics"),
    "cudagraph_capture_sizes": ("[1, 2, 4]", None),
}


@pytest.mark.parametrize("name", LISTS)
def test_lists_and_tables_reach_vllm_as_the_file_has_them(parse, write_file, name):
    text, expected = LISTS[name]
    path = write_file(f"[vllm]\n{name} = {text}\n")
    found = getattr(parse("serve", "MODEL", "--plugins", "vllm_instant", "--instant-config", path), name)
    if name == "lora_modules":
        found = [(module.name, module.path) for module in found]
    assert found == (json.loads(text) if expected is None else expected)


def test_ray_workers_get_the_deployment(parse, deploy, monkeypatch):
    monkeypatch.setenv("VLLM_RAY_EXTRA_ENV_VARS_TO_COPY", "MINE")
    parse("serve", "MODEL", "--plugins", "vllm_instant", "--instant-config", deploy)
    assert os.environ["VLLM_RAY_EXTRA_ENV_VARS_TO_COPY"] == "MINE,INSTANT_SETTINGS"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            ["--instant-config", "x.toml"],
            "--instant-config: has no effect without the plugin: add --plugins vllm_instant",
        ),
        (["--plugins", "other", "--instant-set", "a.b=1"], "--instant-set: has no effect without the plugin"),
        (["--plugins", "vllm_instant", "--instant-config", "gone.toml"], "gone.toml: there is no such file"),
        (
            ["--plugins", "vllm_instant", "--instant-config", "FILE", "--scheduler-cls", "a.B"],
            "--scheduler-cls: a.B replaces the scheduler",
        ),
    ],
)
def test_mistakes_are_one_sentence_and_exit_code_2(parse, deploy, capsys, words, sentence):
    with pytest.raises(SystemExit) as caught:
        parse("serve", "MODEL", *(deploy if word == "FILE" else word for word in words))
    assert caught.value.code == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("vllm-instant: ")]
    assert sentence in line


def test_an_option_without_its_value_is_left_to_vllm(parse, capsys):
    with pytest.raises(SystemExit):
        parse("serve", "MODEL", "--instant-config")
    assert "expected one argument" in capsys.readouterr().err


class TestOffline:
    @pytest.fixture
    def engine_args(self, parse, demo_pair, monkeypatch):
        from vllm.engine.arg_utils import EngineArgs

        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        monkeypatch.setattr(flags, "_published_offline", False)
        return lambda **rest: EngineArgs(model=str(demo_pair.target), **rest)

    def test_a_file_selects(self, engine_args, deploy):
        config = engine_args(additional_config={"vllm_instant": str(deploy), "mine": 1}).create_engine_config()
        assert config.scheduler_config.scheduler_cls == SCHEDULER
        assert config.scheduler_config.max_num_seqs == 5
        assert config.speculative_config.num_speculative_tokens == 3
        assert config.additional_config == {"mine": 1}, "the key must not enter the compilation cache key"
        assert deployment_env.get_deployment().slots["drafter"].plugin == "ngram"

    def test_explicit_arguments_win(self, engine_args, deploy):
        args = engine_args(additional_config={"vllm_instant": str(deploy)}, max_num_seqs=9)
        assert args.create_engine_config().scheduler_config.max_num_seqs == 9

    def test_true_takes_the_defaults(self, engine_args):
        engine_args(additional_config={"vllm_instant": True}).create_engine_config()
        assert deployment_env.get_deployment().file is None

    def test_the_next_engine_without_the_key_is_stock(self, engine_args, deploy):
        engine_args(additional_config={"vllm_instant": str(deploy)}).create_engine_config()
        config = engine_args().create_engine_config()
        assert config.scheduler_config.scheduler_cls is None
        assert deployment_env.get_deployment() is None

    @pytest.mark.parametrize(
        ("value", "sentence"), [(3, "expected the path of a deployment file"), ("gone.toml", "there is no such file")]
    )
    def test_mistakes_are_one_sentence(self, engine_args, value, sentence):
        with pytest.raises(Exception, match=sentence):
            engine_args(additional_config={"vllm_instant": value}).create_engine_config()


INERTNESS = """
import json, sys, types
import vllm.entrypoints.cli.serve, vllm.v1.engine.core, vllm.v1.engine.async_llm
import vllm.v1.core.sched.async_scheduler, vllm.utils.cpu_triton_utils, vllm.v1.worker.gpu_model_runner

def snapshot():
    seen = {}
    for module_name, module in list(sys.modules.items()):
        if not (module_name == "vllm" or module_name.startswith("vllm.")):
            continue
        for name, value in list(vars(module).items()):
            seen[f"{module_name}:{name}"] = id(value)
            if isinstance(value, type) and value.__module__ == module_name:
                for attribute, inner in list(vars(value).items()):
                    seen[f"{module_name}:{name}.{attribute}"] = id(inner)
    return seen

before = snapshot()
from vllm_instant.register import register
register()
register()
after = snapshot()
print(json.dumps(sorted(key for key in before.keys() | after.keys() if before.get(key) != after.get(key))))
"""


def test_unselected_nothing_but_the_flags_is_changed():
    result = subprocess.run([sys.executable, "-c", INERTNESS], capture_output=True, text=True, check=True)
    changed = json.loads(result.stdout.splitlines()[-1])
    parser_class = "vllm.utils.argparse_utils:FlexibleArgumentParser"
    assert changed == sorted(
        [
            "vllm.engine.arg_utils:EngineArgs.add_cli_args",
            "vllm.engine.arg_utils:EngineArgs.create_engine_config",
            f"{parser_class}._pull_args_from_config",
            f"{parser_class}.load_config_file",
            f"{parser_class}.parse_args",
        ]
    )
