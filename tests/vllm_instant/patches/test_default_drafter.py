"""Who gets the default drafter, and which requests are served without drafts."""

from types import SimpleNamespace

import pytest

from vllm_instant.deployment.errors import DeploymentError, Problem
from vllm_instant.deployment.resolved import PLUGIN_DRAFTER, drafter_arguments, engine_arguments, is_default_drafter
from vllm_instant.deployment.settings import resolve
from vllm_instant.patches import default_drafter, flags, plugin_factory
from vllm_instant.patches.admission import needs_no_drafts
from vllm_instant.patches.default_drafter import may_be_used
from vllm_instant.patches.http_routes import as_served


def _arguments(**given):
    return SimpleNamespace(**{"speculative_config": None, "spec_method": None, "logits_processors": None, **given})


def _deployment(*overrides):
    return resolve(None, overrides)


@pytest.fixture(autouse=True)
def _on_a_cpu(monkeypatch):
    from vllm.platforms import current_platform

    monkeypatch.setattr(type(current_platform), "is_cpu", lambda self: True)


def test_without_any_choice_it_is_used():
    assert may_be_used(_arguments(), _deployment())
    assert drafter_arguments(_deployment())["speculative_config"]["model"] == PLUGIN_DRAFTER


@pytest.mark.parametrize(
    "given",
    [
        {"speculative_config": {"method": "ngram"}},
        {"spec_method": "ngram"},
        {"logits_processors": ["a.B"]},
        {"enable_lora": True},
        {"async_scheduling": True},
        {"watermark_config": {"algorithm": "gumbel"}},
        {"enable_trace_replay": True},
        {"enable_dbo": True},
        {"reasoning_parser": "deepseek_r1"},
        {"reasoning_config": {"reasoning_start_str": "<think>", "reasoning_end_str": "</think>"}},
    ],
    ids=lambda given: next(iter(given)),
)
def test_not_against_what_was_typed(given):
    assert not may_be_used(_arguments(**given), _deployment())


@pytest.mark.parametrize(
    "given", [{"async_scheduling": None}, {"async_scheduling": False}, {"enable_lora": False}, {"reasoning_parser": ""}]
)
def test_it_is_used_where_these_features_are_off(given):
    assert may_be_used(_arguments(**given), _deployment())


def test_an_installed_logits_processor_rules_it_out(monkeypatch):
    monkeypatch.setattr(default_drafter, "entry_points", lambda group: [group])
    assert not may_be_used(_arguments(), _deployment())


def test_the_log_says_why_it_is_left_out(monkeypatch, caplog):
    monkeypatch.setattr(default_drafter.deployment_env, "get_deployment", _deployment)
    arguments = _arguments(enable_lora=True, scheduler_cls=None)
    with caplog.at_level("INFO", "vllm.instant"):
        default_drafter._create_speculative_config(lambda *_: None, arguments, None)
    assert "The default drafter is left out because of --enable-lora" in caplog.text


@pytest.mark.parametrize("override", ["drafter.plugin=native", "drafter.plugin=ngram", "speculation.plugin=off"])
def test_not_against_the_deployment(override):
    assert not may_be_used(_arguments(), _deployment(override))


def test_a_drafter_that_was_named_is_no_default():
    named = _deployment("drafter.plugin=suffix")
    assert not is_default_drafter(named)
    assert "speculative_config" in engine_arguments(named)
    assert "speculative_config" not in engine_arguments(_deployment())


def test_options_of_the_default_drafter_need_no_name():
    arguments = drafter_arguments(_deployment("drafter.num_speculative_tokens=5"))
    assert arguments["speculative_config"]["num_speculative_tokens"] == 5


def test_not_where_scheduling_overlaps(monkeypatch):
    from vllm.platforms import current_platform

    monkeypatch.setattr(type(current_platform), "is_cpu", lambda self: False)
    assert not may_be_used(_arguments(), _deployment())


def test_who_drafts_decides_whether_drafts_are_priced():
    deployment = _deployment("drafter.plugin=suffix")
    ours = SimpleNamespace(method="custom_class", model=PLUGIN_DRAFTER)
    assert plugin_factory.uses_drafter_plugin(deployment, ours)
    assert not plugin_factory.uses_drafter_plugin(
        deployment, SimpleNamespace(method="custom_class", model="other.Drafter")
    )
    assert not plugin_factory.uses_drafter_plugin(deployment, SimpleNamespace(method="ngram", model="ngram"))


def test_a_default_drafter_that_does_not_draft_is_not_shown_as_served():
    ours = SimpleNamespace(method="custom_class", model=PLUGIN_DRAFTER)
    theirs = SimpleNamespace(method="ngram", model="ngram")
    named, default = _deployment("drafter.plugin=suffix"), _deployment()
    shown = [as_served(d, c).slots["drafter"].plugin for d in (default, named) for c in (ours, theirs, None)]
    assert shown == ["suffix", "native", "native", "suffix", "suffix", "suffix"]


@pytest.mark.parametrize(
    ("min_p", "logit_bias", "expected"),
    [(0.0, None, False), (0.1, None, True), (0.0, {5: 1.0}, True), (0.0, {}, False)],
)
def test_what_the_rejection_sampler_cannot_verify(min_p, logit_bias, expected):
    assert needs_no_drafts(SimpleNamespace(min_p=min_p, logit_bias=logit_bias)) is expected
    assert needs_no_drafts(None) is False


@pytest.mark.parametrize("error", [ValueError("Target and draft\n differ."), OSError("no file")])
def test_a_drafter_that_vllm_refuses_is_one_sentence(monkeypatch, error):
    def create(*_):
        raise error

    target = SimpleNamespace(runner_type="generate", is_encoder_decoder=False)
    arguments = _arguments(scheduler_cls=None)
    chosen = _deployment("drafter.plugin=ngram")
    monkeypatch.setattr(default_drafter.deployment_env, "get_deployment", lambda: chosen)
    with pytest.raises(DeploymentError) as caught:
        default_drafter._create_speculative_config(create, arguments, target)
    [problem] = caught.value.problems
    assert problem.key == "[drafter]"
    assert problem.message == " ".join(str(error).split())
    # What the user typed is vLLM's to refuse.
    for deployment in (None, _deployment()):
        monkeypatch.setattr(default_drafter.deployment_env, "get_deployment", lambda deployment=deployment: deployment)
        with pytest.raises(type(error)):
            default_drafter._create_speculative_config(create, arguments, target)


def test_errors_of_a_command_line_end_without_a_traceback(monkeypatch, capsys):
    def create(*_):
        raise DeploymentError([Problem("deploy.toml", "[drafter]", "the model does not fit")])

    arguments = SimpleNamespace(additional_config=None)
    monkeypatch.setattr(flags, "_from_command_line", False)
    with pytest.raises(DeploymentError):
        flags._create_engine_config(create, arguments)
    monkeypatch.setattr(flags, "_from_command_line", True)
    with pytest.raises(SystemExit):
        flags._create_engine_config(create, arguments)
    assert capsys.readouterr().err == "vllm-instant: deploy.toml: [drafter]: the model does not fit\n"


def _model(**given):
    plain = {
        "runner_type": "generate",
        "is_encoder_decoder": False,
        "is_diffusion": False,
        "is_hybrid": False,
        "is_attention_free": False,
    }
    return SimpleNamespace(**(plain | given))


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (_model(), None),
        (_model(runner_type="pooling"), "text generation"),
        (_model(is_encoder_decoder=True), "encoder"),
        (_model(is_diffusion=True), "canvas"),
        (_model(is_hybrid=True), "recurrent layers"),
        (_model(is_attention_free=True), "recurrent layers"),
    ],
)
def test_models_that_rejected_drafts_could_harm_get_none(model, words, monkeypatch, caplog):
    monkeypatch.setattr(default_drafter.deployment_env, "get_deployment", _deployment)
    arguments = _arguments(scheduler_cls=default_drafter.QUALIFIED_NAME)
    with caplog.at_level("INFO", "vllm.instant"):
        default_drafter._create_speculative_config(lambda *_: None, arguments, model)
    assert (arguments.speculative_config is None) == (words is not None)
    assert (words or "") in caplog.text


@pytest.mark.engine
@pytest.mark.parametrize(
    ("architecture", "supported"),
    [
        ("LlamaForCausalLM", True),
        ("Qwen3MoeForCausalLM", True),
        ("Lfm2ForCausalLM", False),
        ("GraniteMoeHybridForCausalLM", False),
        ("Qwen3NextForCausalLM", False),
        ("Mamba2ForCausalLM", False),
    ],
)
def test_the_default_drafter_by_architecture_as_vllm_describes_it(architecture, supported):
    """Recurrent layers must be told how many drafts were accepted; a default must not depend on whether they are."""
    from vllm.model_executor.models.registry import ModelRegistry, _ModelInfo

    info = _ModelInfo.from_model_cls(ModelRegistry.models[architecture].load_model_cls())
    model = _model(is_hybrid=info.is_hybrid, is_attention_free=info.is_attention_free)
    assert (default_drafter.unsupported_model(model) is None) == supported


ROTATION = {"rope_type": "default", "rope_theta": 10000.0}


def _drafted(positions, rope, max_model_len=1024):
    """The configuration of a draft model with this number of positions after a deployment that names it."""
    draft = SimpleNamespace(max_position_embeddings=positions, rope_parameters=rope)
    created = SimpleNamespace(method="draft_model", draft_model_config=SimpleNamespace(hf_text_config=draft))
    target = SimpleNamespace(max_model_len=max_model_len)
    default_drafter._create_speculative_config(lambda *_: created, _arguments(scheduler_cls=None), target)
    return draft.max_position_embeddings


def test_a_draft_model_of_fewer_positions_gets_those_of_the_target(monkeypatch):
    monkeypatch.setattr(default_drafter.deployment_env, "get_deployment", lambda: _deployment("drafter.plugin=ngram"))
    assert _drafted(128, ROTATION) == 1024
    assert _drafted(2048, ROTATION) == 2048
    assert _drafted(None, ROTATION) is None


def test_a_table_of_positions_that_is_too_short_is_refused_with_both_numbers(monkeypatch):
    monkeypatch.setattr(default_drafter.deployment_env, "get_deployment", lambda: _deployment("drafter.plugin=ngram"))
    with pytest.raises(DeploymentError, match="128 positions, requests may have 1024 tokens"):
        _drafted(128, None)


def test_a_server_without_a_deployment_keeps_its_draft_model_as_it_is(monkeypatch):
    monkeypatch.setattr(default_drafter.deployment_env, "get_deployment", lambda: None)
    assert _drafted(128, ROTATION) == 128
