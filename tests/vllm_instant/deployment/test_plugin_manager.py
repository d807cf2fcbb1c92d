"""Installed plugins, and distributions that cannot be loaded."""

from importlib.metadata import EntryPoint
from types import ModuleType

import pytest

from vllm_instant import Plugin, hookimpl
from vllm_instant.deployment.errors import DeploymentError
from vllm_instant.deployment.plugin_manager import PluginManager, plugin_manager
from vllm_instant.deployment.settings import resolve


class InlineEntryPoint(EntryPoint):
    """An entry point whose module has the given functions as hook implementations."""

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


def _entry_point(name, *plugins):
    return InlineEntryPoint(name, instant_plugins=lambda: list(plugins))


def _plugin(slot="speculation", name="p", **rest):
    return Plugin(slot=slot, name=name, summary="s", **rest)


def test_first_party_plugins_come_through_the_public_entry_point_group():
    assert {(o.distribution, o.plugin.name) for o in plugin_manager().installed_plugins()} >= {
        ("vllm-instant", "goodput"),
        ("vllm-instant", "fixed"),
        ("vllm-instant", "ngram"),
    }


def test_plugins_are_in_the_order_of_the_deployment_file():
    manager = PluginManager(
        [_entry_point("a", _plugin("streaming"), _plugin("speculation", "z"), _plugin("speculation", "b"))]
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
def test_a_broken_distribution_is_reported_by_name_and_the_others_load(functions, words):
    manager = PluginManager([InlineEntryPoint("bad", **functions), _entry_point("good", _plugin())])
    assert manager.names("speculation") == ["p"]
    [broken] = manager.broken
    assert broken.entry_point == "bad"
    assert words in str(broken)


def test_a_name_of_two_distributions_is_an_error_only_where_it_is_chosen(write_file):
    defaults = plugin_manager()._plugins
    manager = PluginManager([_entry_point("one", _plugin()), _entry_point("two", _plugin())])
    manager._plugins.update(defaults)
    resolve(manager=manager)
    with pytest.raises(DeploymentError, match=r"'p' is installed by .* and .*: uninstall one"):
        resolve(write_file('[speculation]\nplugin = "p"\n'), manager=manager)


def test_an_error_found_by_a_distribution_stops_a_deployment():
    manager = PluginManager([InlineEntryPoint("strict", instant_check=lambda deployment: ["no drafts on Sundays"])])
    manager._plugins.update(plugin_manager()._plugins)
    with pytest.raises(DeploymentError, match=r"no drafts on Sundays"):
        resolve(manager=manager)


def test_a_check_that_raises_is_an_error_without_a_traceback():
    manager = PluginManager([InlineEntryPoint("faulty", instant_check=lambda deployment: [1 / 0])])
    manager._plugins.update(plugin_manager()._plugins)
    with pytest.raises(DeploymentError, match=r"faulty cannot check this deployment: ZeroDivisionError"):
        resolve(manager=manager)


def test_engine_arguments_that_raise_are_an_error_without_a_traceback(write_file):
    faulty = _plugin("drafter", "faulty", engine_arguments=lambda options: 1 / 0)
    manager = PluginManager([_entry_point("faulty", faulty)])
    manager._plugins.update(plugin_manager()._plugins)
    with pytest.raises(DeploymentError, match=r"which engine arguments it needs: ZeroDivisionError"):
        resolve(write_file('[drafter]\nplugin = "faulty"\n'), manager=manager)


def test_every_listener_is_told_of_a_failure_even_if_one_raises(caplog):
    received = []
    manager = PluginManager(
        [
            InlineEntryPoint(
                "listener",
                instant_plugin_failed=lambda slot, plugin, hook, error: received.append((slot, plugin, hook)),
            ),
            InlineEntryPoint("broken", instant_plugin_failed=lambda error: 1 / 0),
        ]
    )
    manager.announce_failure("drafter", "x", "propose", ValueError("v"))
    assert received == [("drafter", "x", "propose")]
    assert "broken raised in instant_plugin_failed" in caplog.text
