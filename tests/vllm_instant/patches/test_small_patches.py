"""Small patches: module names, the plugin factory, repairs of the CPU build, steps without drafts."""

import subprocess
import sys
import textwrap
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from patch_harness import wrap
from vllm.config.compilation import CUDAGraphMode

from vllm_instant import Plugin, PluginContext
from vllm_instant.deployment.resolved import drafter_arguments
from vllm_instant.deployment.settings import resolve
from vllm_instant.patches import module_names, plugin_factory, skip_rejection_sampler
from vllm_instant.patches.cpu import numba_scan, sampling
from vllm_instant.patches.names import MODEL_RUNNER


def _python(code: str, cwd=None) -> str:
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, cwd=cwd, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


class TestModuleNames:
    CODE = """
        import importlib.util, sys
        from vllm_instant.patches.module_names import hide_bare_folder
        hidden = hide_bare_folder()
        print(hidden, importlib.util.find_spec("triton_kernels") is not None)
        """

    def test_a_bare_folder_is_hidden(self, tmp_path):
        (tmp_path / "triton_kernels" / "vllm_instant_kernels").mkdir(parents=True)
        assert _python(self.CODE, tmp_path) == "True False"

    def test_a_real_package_is_left_alone(self, tmp_path):
        (tmp_path / "triton_kernels").mkdir()
        (tmp_path / "triton_kernels" / "__init__.py").write_text("")
        assert _python(self.CODE, tmp_path) == "False True"

    def test_nothing_of_ours_is_importable_under_the_names_of_source_folders(self, tmp_path):
        code = 'import importlib.util as u; print([u.find_spec(n) for n in ("triton_kernels", "plugins")])'
        assert _python(code, tmp_path) == "[None, None]"

    @pytest.mark.engine
    def test_vllm_finds_its_own_copy_behind_the_folder(self, tmp_path):
        (tmp_path / "triton_kernels").mkdir()
        code = """
            import sys
            from vllm_instant.register import register
            register()
            import vllm.utils.import_utils as u
            print(u._has_module("triton_kernels"))
            """
        assert _python(code, tmp_path).splitlines()[-1] == "False"

    def test_a_loaded_module_is_not_touched(self):
        assert module_names.hide_bare_folder("json") is False


CONTEXT = PluginContext(
    model="m", max_model_len=10, max_num_seqs=2, vocab_size=5, num_speculative_tokens=3, device="cpu"
)


@pytest.mark.usefixtures("with_test_plugins")
class TestBuilding:
    def _build(self, plugin):
        return plugin_factory.build_guarded("speculation", resolve(None, [f"speculation.plugin={plugin}"]), CONTEXT)

    def test_stock_behaviour_needs_no_object(self):
        assert self._build("off") is None

    def test_a_policy_is_built_with_its_options(self):
        deployment = resolve(None, ["speculation.plugin=fixed", "speculation.max_batch_size=3"])
        contained = plugin_factory.build_guarded("speculation", deployment, CONTEXT)
        assert contained.instance.max_batch_size == 3
        assert contained.plugin == "fixed"

    def test_a_plugin_that_cannot_start_says_why(self):
        with pytest.raises(plugin_factory.PluginStartError) as caught:
            self._build("cannot_start")
        assert str(caught.value) == (
            "plugin cannot_start of slot speculation cannot start: OSError: the model of this policy is not there"
        )

    def test_an_object_that_does_not_follow_the_contract_is_refused(self):
        with pytest.raises(
            plugin_factory.PluginStartError,
            match="has no get_num_draft_tokens, draft_cost, trims_verification, enter, observe, forget, decisions",
        ):
            self._build("incomplete")


def _vllm_config(**changed):
    """A VllmConfig made of plain objects; ``changed`` names attributes as ``part__attribute``."""
    parts = {
        "model_config": {
            "model": "m",
            "tokenizer": "t",
            "skip_tokenizer_init": False,
            "max_model_len": 10,
            "dtype": "torch.bfloat16",
            "quantization": None,
            "enforce_eager": False,
            "get_vocab_size": lambda: 5,
        },
        "parallel_config": {
            "tensor_parallel_size": 1,
            "pipeline_parallel_size": 1,
            "data_parallel_size": 1,
            "decode_context_parallel_size": 1,
            "enable_expert_parallel": False,
        },
        "scheduler_config": {"max_num_seqs": 2, "async_scheduling": False},
        "speculative_config": {
            "method": "draft_model",
            "model": "d",
            "num_speculative_tokens": 3,
            "enable_adaptive_verification": False,
        },
        "device_config": {"device_type": "cpu"},
        "cache_config": {"cache_dtype": "auto"},
        "attention_config": {"backend": None},
        "compilation_config": {"cudagraph_mode": CUDAGraphMode.NONE, "max_cudagraph_capture_size": 0},
    }
    top = {"use_v2_model_runner": changed.pop("use_v2_model_runner", False)}
    for name, value in changed.items():
        part, attribute = name.split("__")
        parts[part][attribute] = value
    return SimpleNamespace(**top, **{name: SimpleNamespace(**attributes) for name, attributes in parts.items()})


@pytest.mark.parametrize(
    "changed",
    [
        {"use_v2_model_runner": True},
        {"scheduler_config__async_scheduling": True},
        {"compilation_config__cudagraph_mode": CUDAGraphMode.FULL},
        {"attention_config__backend": SimpleNamespace(name="FLASHINFER")},
        {"parallel_config__data_parallel_size": 2},
        {"parallel_config__tensor_parallel_size": 2},
        {"parallel_config__pipeline_parallel_size": 2},
        {"parallel_config__decode_context_parallel_size": 2},
        {"parallel_config__enable_expert_parallel": True},
        {"speculative_config__num_speculative_tokens": 5},
        {"model_config__dtype": "torch.float32"},
        {"model_config__enforce_eager": True},
        {"cache_config__cache_dtype": "fp8"},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_costs_of_steps_are_kept_apart_by_whatever_they_depend_on(changed):
    usual, other = (plugin_factory.context_of(config).identity for config in (_vllm_config(), _vllm_config(**changed)))
    assert usual == plugin_factory.context_of(_vllm_config()).identity
    assert usual != other


def test_costs_with_adaptive_verification_are_kept_apart_and_the_policy_learns_of_it():
    trims = {"speculative_config__enable_adaptive_verification": True}
    on_v1, usual, other = (
        plugin_factory.context_of(_vllm_config(**options))
        for options in (trims, {"use_v2_model_runner": True}, {"use_v2_model_runner": True, **trims})
    )
    assert [context.adaptive_verification for context in (on_v1, usual, other)] == [False, False, True]
    assert usual.identity != other.identity


@pytest.mark.parametrize(
    ("changed", "tokenizer"),
    [({}, "t"), ({"model_config__skip_tokenizer_init": True}, ""), ({"model_config__tokenizer": None}, "")],
)
def test_a_plugin_learns_which_tokenizer_there_is(changed, tokenizer):
    assert plugin_factory.context_of(_vllm_config(**changed)).tokenizer == tokenizer


@pytest.mark.parametrize(
    ("changed", "plugin", "confident", "self_calibrating"),
    [
        ({}, "suffix", True, True),
        ({}, "hybrid", True, False),
        ({"use_v2_model_runner": True}, "suffix", False, False),
        ({"speculative_config__method": "ngram", "speculative_config__model": None}, "suffix", False, False),
    ],
)
def test_a_policy_learns_whether_drafts_state_a_confidence_that_needs_no_probes(
    changed, plugin, confident, self_calibrating
):
    model = ["drafter.model=d"] if plugin == "hybrid" else []
    deployment = resolve(overrides=[f"drafter.plugin={plugin}", *model])
    arguments = drafter_arguments(deployment)["speculative_config"]
    usual = {f"speculative_config__{name}": arguments[name] for name in ("method", "model")}
    context = plugin_factory.context_of(_vllm_config(**usual | changed), deployment)
    assert (context.confident_drafts, context.self_calibrating_drafts) == (confident, self_calibrating)


@pytest.mark.parametrize(("changed", "expected"), [({}, False), ({"parallel_config__data_parallel_size": 2}, True)])
def test_a_clock_disables_no_plugin_of_several_ranks(changed, expected):
    context = plugin_factory.context_of(_vllm_config(**changed))
    assert plugin_factory._must_agree("rejection_sampler", context) is expected
    assert plugin_factory._must_agree("speculation", context) is False
    assert plugin_factory._is_timed("rejection_sampler", context) is not expected


def test_kernels_that_compile_are_no_slow_plugin():
    context = plugin_factory.context_of(_vllm_config())
    assert [plugin_factory._is_timed(slot, context) for slot in ("attention", "drafter")] == [False, True]


class TestCpuSampling:
    @given(
        st.lists(
            st.tuples(st.floats(0, 2, width=32), st.integers(0, 5)),
            min_size=1,
            max_size=8,
        )
    )
    def test_the_repair_expands_values_to_tokens(self, requests):
        import torch

        counts = [count for _, count in requests]
        ends = torch.tensor(counts).cumsum(0).to(torch.int32)
        output = torch.full((sum(counts),), -1.0)
        sampling.expand(output, torch.tensor([value for value, _ in requests]), ends, 0, 1)
        expected = [1.0 if value == 0 else value for value, count in requests for _ in range(count)]
        assert output.tolist() == pytest.approx(expected)

    def test_the_probes_tell_right_from_wrong(self):
        assert not sampling.expansion_is_wrong(sampling.expand)
        assert sampling.expansion_is_wrong(lambda *a: None)
        assert sampling.expansion_is_wrong(lambda *a: 1 / 0)
        assert not sampling.top_k_is_wrong(lambda logits, k: logits)
        assert sampling.top_k_is_wrong(lambda logits, k: k.max())

    @pytest.mark.parametrize("repair", sampling.REPAIRS, ids=lambda repair: repair.function)
    def test_only_a_wrong_function_is_replaced(self, repair):
        from types import ModuleType

        module = ModuleType("m")
        setattr(module, repair.function, lambda *a: 1 / 0)
        repair.apply(module)
        assert not repair.is_wrong(getattr(module, repair.function))
        repaired = getattr(module, repair.function)
        repair.apply(module)
        assert getattr(module, repair.function) is repaired

    @pytest.mark.engine
    @pytest.mark.parametrize("repair", sampling.REPAIRS, ids=lambda repair: repair.function)
    def test_the_repair_works_on_the_installed_vllm(self, repair, monkeypatch):
        from importlib import import_module

        module = import_module(repair.module)
        monkeypatch.setattr(module, repair.function, getattr(module, repair.function))
        repair.apply(module)
        assert not repair.is_wrong(getattr(module, repair.function))

    @pytest.mark.engine
    def test_top_k_still_cuts(self):
        import torch
        from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_only

        repaired = sampling._tolerate_no_rows(apply_top_k_only)
        logits = torch.tensor([[1.0, 3.0, 2.0]])
        assert repaired(logits, torch.tensor([2])).tolist() == [[float("-inf"), 3.0, 2.0]]


@pytest.mark.engine
def test_kernels_are_looked_for_beside_numba():
    """Where the first half fails, vLLM needs this repair no longer."""

    import llvmlite.binding.ffi
    from vllm.triton_utils import dispatcher

    search = getattr(dispatcher._rebind_kernels, "__wrapped__", dispatcher._rebind_kernels)
    with pytest.raises(AttributeError, match="_lib_fn_wrapper"):
        search([])
    wrap(numba_scan.PATCH, numba_scan.DISPATCHER_MODULE, _rebind_kernels=search)._rebind_kernels([])
    assert sys.modules[numba_scan.HIDDEN] is llvmlite.binding.ffi


def test_plugin_objects_are_frozen():
    plugin = Plugin(slot="speculation", name="x", summary="s")
    with pytest.raises(AttributeError):
        plugin.name = "y"


class TestPlainSampling:
    """Only a synchronous step without any draft goes past the rejection sampler."""

    @pytest.mark.parametrize(
        ("drafts", "asynchronous", "verified"),
        [([0, 0], False, False), ([0, 1], False, True), ([0, 0], True, True), (None, False, False)],
    )
    def test_what_goes_to_the_rejection_sampler(self, drafts, asynchronous, verified):
        seen = []

        class GPUModelRunner:
            use_async_scheduling = asynchronous

            def _sample(self, logits, spec_decode_metadata):
                seen.append(spec_decode_metadata)
                return logits

        wrap(skip_rejection_sampler.PATCH, MODEL_RUNNER, GPUModelRunner=GPUModelRunner)
        metadata = None if drafts is None else SimpleNamespace(num_draft_tokens=drafts)
        assert GPUModelRunner()._sample("logits", metadata) == "logits"
        assert seen == [metadata if verified else None]
