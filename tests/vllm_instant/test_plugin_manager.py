"""Finding plugins, and failures with a name."""

from importlib.metadata import EntryPoint
from types import ModuleType

import pytest

from vllm_instant import Plugin, hookimpl
from vllm_instant.deployment.errors import DeploymentError
from vllm_instant.deployment.plugin_manager import PluginManager, plugin_manager
from vllm_instant.deployment.settings import resolve


class InlineEntryPoint(EntryPoint):
    """An entry point whose module is made on the spot."""

    def __new__(cls, name, **functions):
        instance = super().__new__(cls)
        EntryPoint.__init__(instance, name=name, value=f"{name}_module", group="vllm_instant")
        module = ModuleType(f"{name}_module")
        for key, function in functions.items():
            setattr(module, key, hookimpl(function))
        vars(instance)["load"] = lambda: module
        return instance

    def __init__(self, *args, **kwargs):
        pass


def _offering(name, *plugins):
    return InlineEntryPoint(name, instant_plugins=lambda: list(plugins))


def _plugin(slot="speculation", name="p", **rest):
    return Plugin(slot=slot, name=name, summary="s", **rest)


def test_first_party_plugins_come_through_the_public_entry_point_group():
    assert {(o.distribution, o.plugin.name) for o in plugin_manager().installed_plugins()} >= {
        ("vllm-instant", "goodput"),
        ("vllm-instant", "fixed"),
        ("vllm-instant", "ngram"),
    }


def test_offers_are_in_the_order_of_the_deployment_file():
    manager = PluginManager(
        [_offering("a", _plugin("streaming"), _plugin("speculation", "z"), _plugin("speculation", "b"))]
    )
    assert [(o.plugin.slot, o.plugin.name) for o in manager.installed_plugins()] == [
        ("speculation", "b"),
        ("speculation", "z"),
        ("streaming", "p"),
    ]


@pytest.mark.parametrize(
    ("functions", "words"),
    [
        ({"instant_plugins": lambda: 1 / 0}, "ZeroDivisionError"),
        ({"instant_plugins": lambda: ["fixed"]}, "must return Plugin objects"),
        ({"instant_plugins": lambda: [_plugin("nothing")]}, "unknown slot 'nothing'"),
        ({"instant_plugin": lambda: []}, "instant_plugin"),
    ],
)
def test_a_broken_distribution_has_a_name_and_harms_no_other(functions, words):
    manager = PluginManager([InlineEntryPoint("bad", **functions), _offering("good", _plugin())])
    assert manager.names("speculation") == ["p"]
    [broken] = manager.broken
    assert broken.entry_point == "bad"
    assert words in str(broken)


def test_the_same_name_twice_is_a_problem_only_for_who_chooses_it(write_file):
    defaults = plugin_manager()._offers
    manager = PluginManager([_offering("one", _plugin()), _offering("two", _plugin())])
    manager._offers.update(defaults)
    resolve(manager=manager)
    with pytest.raises(DeploymentError, match=r"'p' is offered by .* and .*: uninstall one"):
        resolve(write_file('[speculation]\nplugin = "p"\n'), manager=manager)


def test_objections_of_a_distribution_stop_a_deployment():
    manager = PluginManager([InlineEntryPoint("strict", instant_check=lambda deployment: ["not on Sundays"])])
    manager._offers.update(plugin_manager()._offers)
    with pytest.raises(DeploymentError, match=r"not on Sundays"):
        resolve(manager=manager)


def test_a_check_that_fails_is_an_objection_and_no_traceback():
    manager = PluginManager([InlineEntryPoint("faulty", instant_check=lambda deployment: [1 / 0])])
    manager._offers.update(plugin_manager()._offers)
    with pytest.raises(DeploymentError, match=r"faulty cannot check this deployment: ZeroDivisionError"):
        resolve(manager=manager)


def test_engine_arguments_that_cannot_be_told_are_no_traceback(write_file):
    faulty = _plugin("drafter", "faulty", engine_arguments=lambda options: 1 / 0)
    manager = PluginManager([_offering("faulty", faulty)])
    manager._offers.update(plugin_manager()._offers)
    with pytest.raises(DeploymentError, match=r"which engine arguments it needs: ZeroDivisionError"):
        resolve(write_file('[drafter]\nplugin = "faulty"\n'), manager=manager)


def test_a_listener_hears_of_failures_and_may_fail_itself(caplog):
    heard = []
    manager = PluginManager(
        [
            InlineEntryPoint(
                "ear", instant_plugin_failed=lambda slot, plugin, hook, error: heard.append((slot, plugin, hook))
            ),
            InlineEntryPoint("deaf", instant_plugin_failed=lambda error: 1 / 0),
        ]
    )
    manager.announce_failure("drafter", "x", "propose", ValueError("v"))
    assert heard == [("drafter", "x", "propose")]
    assert "deaf failed to hear of a disabled plugin" in caplog.text
