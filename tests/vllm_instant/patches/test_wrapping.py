"""Each method of vLLM is wrapped once, by its features in a fixed order."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from vllm_instant.patches import registry
from vllm_instant.patches.compat import VllmPatch
from vllm_instant.patches.wrapped_methods import METHODS
from vllm_instant.patches.wrapping import PatchConflictError, WrappedMethod, Wrapping, wrap_method

TARGET = "engine:Engine.step"


def _feature(name, target=TARGET, **more):
    def wrapper(inner, engine, number):
        return [name, *inner(number + 1), name]

    return VllmPatch(name, "purpose", (), wraps={target: wrapper}, **more)


def _engine():
    class Engine:
        def step(self, number):
            return [number]

    return SimpleNamespace(Engine=Engine)


def _order(method):
    for target, features in METHODS.items():
        if target.endswith(method):
            return tuple(patch.name for patch in features)
    raise KeyError(method)


@pytest.mark.parametrize(
    ("method", "order"),
    [
        ("gpu_model_runner:GPUModelRunner.__init__", ("experts", "v2_drafter", "rejection_sampler", "full_graphs")),
        ("gpu.model_runner:GPUModelRunner.__init__", ("experts", "hybrid_drafting")),
        ("EngineArgs.create_speculative_config", ("default_drafter", "v2_drafter")),
        ("GPUModelRunner.initialize_kv_cache", ("experts", "hybrid_drafting")),
        ("GPUModelRunner._update_states", ("hybrid_drafting", "draft_model_skip", "drafter")),
        ("GPUModelRunner.propose_draft_token_ids", ("hybrid_drafting", "draft_model_skip", "drafter")),
        ("GPUModelRunner._sample", ("cpu_generator_offset", "skip_rejection_sampler")),
        ("CPUModelRunner.sample_tokens", ("cpu_single_rpc",)),
        ("GPUModelRunner.sample_tokens", ("experts",)),
        ("StandaloneARSpeculator.propose", ("v2_hybrid", "v2_draft_model")),
        ("EngineCore.post_step", ("cpu_single_rpc", "engine_core")),
        ("Scheduler.update_from_output", ("cpu_single_rpc", "moe_reports")),
        ("InputProcessor.__init__", ("min_p_logit_bias",)),
        ("InputProcessor.process_inputs", ("request_validation", "guard")),
        ("BaseModelLoader.load_model", ("feed_forward", "fused_rope")),
    ],
)
def test_the_features_of_a_method_have_a_fixed_order(method, order):
    assert _order(method) == order


def test_every_wrapper_of_every_patch_has_a_row():
    declared = {(patch.name, target) for patch in registry.PATCHES for target in patch.wraps}
    listed = {(patch.name, target) for target, features in METHODS.items() for patch in features}
    assert declared == listed


def test_every_wrapped_method_is_one_that_its_patch_checks():
    """A signature, or at least the definition, is among the requirements of the same patch."""
    unchecked = [
        (patch.name, target)
        for target, features in METHODS.items()
        for patch in features
        if not any(_checks(requirement, target) for requirement in patch.requirements)
    ]
    assert unchecked == []


def _checks(requirement, target):
    # The class may be a base class, or be imported by the module that is named.
    method = target.rpartition(":")[2].rpartition(".")[2]
    return requirement.name.rpartition(".")[2] == method or method in getattr(requirement, "words", ())


class TestOrder:
    def test_the_first_feature_is_the_outermost(self):
        method = WrappedMethod(TARGET, (_feature("outer"), _feature("inner")))
        module = _engine()
        method.activate(("outer", "inner"))
        method.apply(module)
        assert module.Engine().step(1) == ["outer", "inner", 3, "inner", "outer"]

    def test_features_that_are_not_active_are_not_called(self):
        method = WrappedMethod(TARGET, (_feature("outer"), _feature("inner")))
        module = _engine()
        method.apply(module)
        assert module.Engine().step(1) == [1]
        method.activate(("inner",))
        assert module.Engine().step(1) == ["inner", 2, "inner"]

    def test_functions_are_wrapped_without_an_instance(self):
        module = SimpleNamespace(double=lambda number: 2 * number)
        target = "m:double"
        patch = VllmPatch("p", "purpose", (), wraps={target: lambda inner, number: inner(number) + 1})
        method = WrappedMethod(target, (patch,))
        method.activate(("p",))
        method.apply(module)
        assert module.double(3) == 7

    def test_a_row_names_only_patches_that_wrap_its_method(self):
        with pytest.raises(KeyError, match=r"patch other does not wrap engine:Engine\.step"):
            WrappedMethod(TARGET, (_feature("other", "engine:Engine.stop"),))


class TestConflicts:
    def test_a_second_patch_of_the_same_method_is_refused(self):
        module = _engine()
        WrappedMethod(TARGET, (_feature("first"),)).apply(module)
        with pytest.raises(PatchConflictError, match=r"Engine\.step .* is patched already.*wrapped_methods\.py"):
            WrappedMethod(TARGET, (_feature("second"),)).apply(module)
        with pytest.raises(PatchConflictError):
            wrap_method(module.Engine, "step", lambda inner, engine, number: inner(number))

    def test_the_same_wrapper_is_applied_once(self):
        module, method = _engine(), WrappedMethod(TARGET, (_feature("only"),))
        method.activate(("only",))
        method.apply(module)
        method.apply(module)
        assert module.Engine().step(1) == ["only", 2, "only"]

    def test_a_subclass_may_be_wrapped_beside_its_base_class(self):
        module = _engine()
        WrappedMethod(TARGET, (_feature("base"),)).apply(module)
        module.Special = type("Special", (module.Engine,), {})
        target = "engine:Special.step"
        method = WrappedMethod(target, (_feature("special", target),))
        method.activate(("special",))
        method.apply(module)
        assert module.Special().step(1) == ["special", 2, "special"]
        assert module.Engine().step(1) == [1]


class TestImports:
    """With modules of a temporary folder in the place of vLLM's."""

    @pytest.fixture
    def module(self, tmp_path, monkeypatch, request):
        name = f"instant_sample_{request.node.name}"
        (tmp_path / f"{name}.py").write_text("class Engine:\n    def step(self, number):\n        return [number]\n")
        monkeypatch.syspath_prepend(str(tmp_path))
        yield name
        sys.modules.pop(name, None)

    def test_changes_wait_for_the_import_and_happen_once(self, module):
        seen = []
        target = f"{module}:Engine.step"
        patch = _feature("late", target, on_import={module: lambda loaded: seen.append(loaded.__name__)})
        wrapping = Wrapping({target: (patch,)})
        wrapping.activate((patch,))
        wrapping.activate((patch,))
        assert seen == []
        assert module not in sys.modules
        engine = __import__(module).Engine
        assert seen == [module]
        assert engine().step(1) == ["late", 2, "late"]

    def test_a_loaded_module_is_changed_at_once(self, module):
        engine = __import__(module).Engine
        target = f"{module}:Engine.step"
        patch = _feature("now", target)
        wrapping = Wrapping({target: (patch,)})
        assert not wrapping.is_active(patch)
        wrapping.activate((patch,))
        assert wrapping.is_active(patch)
        assert engine().step(1) == ["now", 2, "now"]

    def test_a_feature_may_be_activated_after_another_one(self, module):
        """Several engines may follow each other in one process, with different deployments."""
        engine = __import__(module).Engine
        target = f"{module}:Engine.step"
        first, second = _feature("inner", target), _feature("outer", target)
        wrapping = Wrapping({target: (second, first)})
        wrapping.activate((first,))
        assert engine().step(1) == ["inner", 2, "inner"]
        wrapping.activate((second,))
        assert engine().step(1) == ["outer", "inner", 3, "inner", "outer"]
