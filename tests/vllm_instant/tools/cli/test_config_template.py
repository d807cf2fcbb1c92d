"""The deployment file that ``vllm-instant config init`` writes."""

import re
from pathlib import Path

import pytest
from pydantic import Field

from vllm_instant import Plugin, PluginOptions
from vllm_instant.deployment.plugin_manager import plugin_manager
from vllm_instant.tools.cli.config import _options_of, template

SNAPSHOT = Path(__file__).parent / "template.toml"
_HEADING = re.compile(r"# (?:More options|Options) of plugin = (.*):")
_OPTION = re.compile(r"# (\w+) (?:= |is not set)")


def test_the_whole_template():
    """After a change that is meant: vllm-instant config init tests/vllm_instant/tools/cli/template.toml --force."""
    assert template() == SNAPSHOT.read_text(encoding="utf-8")


def _listed() -> dict[tuple[str, str], list[str]]:
    """The options that the template shows, by slot and plugin."""
    listed: dict[tuple[str, str], list[str]] = {}
    slot, names = "", []
    for line in template().splitlines():
        if table := re.fullmatch(r"\[(\w+)\]", line):
            slot, names = table[1], []
        elif heading := _HEADING.fullmatch(line):
            names = [name.strip('"') for name in heading[1].split(" or ")]
        elif (option := _OPTION.match(line)) and names:
            for name in names:
                listed.setdefault((slot, name), []).append(option[1])
    return listed


@pytest.mark.parametrize(
    "plugin",
    [found.plugin for found in plugin_manager().installed_plugins()],
    ids=lambda plugin: f"{plugin.slot}-{plugin.name}",
)
def test_every_plugin_has_exactly_its_own_options(plugin):
    assert sorted(_listed().get((plugin.slot, plugin.name), [])) == sorted(plugin.options.model_fields)


class Base(PluginOptions):
    first: int = Field(1, description="First.")


class Longer(Base):
    second: int = Field(2, description="Second.")


class Changed(Base):
    first: int = Field(3, description="First.")
    third: int = Field(..., description="Third.")


def test_options_that_are_inherited_unchanged_are_printed_once():
    plugins = [Plugin(slot="drafter", name=o.__name__, summary="", options=o) for o in (Base, Longer, Changed)]
    assert [" ".join(line.split()) for line in _options_of(plugins)] == [
        '# Options of plugin = "Base" or "Longer":',
        "# first = 1 # First.",
        '# More options of plugin = "Longer":',
        "# second = 2 # Second.",
        '# Options of plugin = "Changed":',
        "# first = 3 # First.",
        "# third = ... (required) # Third.",
    ]
