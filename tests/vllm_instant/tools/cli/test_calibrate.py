"""What ``vllm-instant calibrate`` asks of the plugins of a deployment; no plugin has a special rank."""

import importlib.util
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from vllm_instant.deployment.plugin_manager import plugin_manager
from vllm_instant.deployment.settings import resolve
from vllm_instant.tools.cli import app, calibrate


@pytest.fixture
def plugin_with(monkeypatch):
    """Give plugins of the defaults other calibration options; all others have none."""

    def change(**by_slot):
        installed = [
            replace(found, plugin=replace(found.plugin, calibration_options=by_slot.get(found.plugin.slot)))
            for found in plugin_manager().installed_plugins()
        ]
        named = {(found.plugin.slot, found.plugin.name): found for found in installed}
        monkeypatch.setattr(calibrate, "installed_plugin", lambda d, slot: named[slot, d.slots[slot].plugin])
        monkeypatch.setattr(calibrate.plugin_manager(), "installed_plugins", lambda: iter(installed))

    return change


def test_every_plugin_that_stores_costs_is_told_to(plugin_with):
    plugin_with(speculation=lambda options: {"calibrating": True}, batching=lambda options: {"pace": 1.5, "for": "all"})
    settings = calibrate.calibration_settings(resolve())
    assert settings == ["speculation.calibrating=true", "batching.pace=1.5", 'batching.for="all"']


def test_a_plugin_refuses_where_nothing_would_be_stored(plugin_with, capsys):
    def refuse(options):
        raise ValueError(f"slowest_request = {options.slowest_request}: nothing would be stored")

    plugin_with(speculation=refuse)
    result = CliRunner().invoke(app, ["calibrate", "MODEL"])
    assert result.exit_code == 2
    assert result.stderr == "vllm-instant: [speculation] slowest_request = 0.95: nothing would be stored\n"


def test_a_deployment_without_costs_names_the_plugins_that_store_them(plugin_with):
    plugin_with(experts=lambda options: {})
    result = CliRunner().invoke(app, ["calibrate", "MODEL", "--set", "speculation.plugin=off"])
    assert result.exit_code == 2
    assert "no plugin of this deployment stores costs; installed plugins that do: [experts] native" in result.stderr


def test_vllm_is_needed_last(plugin_with, monkeypatch):
    plugin_with(speculation=lambda options: {"calibrating": True})
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "calibrate needs vLLM" in CliRunner().invoke(app, ["calibrate", "MODEL"]).stderr
