"""``vllm-instant config``: write, check and show deployment files."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic.fields import FieldInfo

from vllm_instant.deployment.plugin_manager import plugin_manager
from vllm_instant.deployment.resolved import engine_arguments
from vllm_instant.deployment.secrets import masked
from vllm_instant.deployment.settings import DEFAULT_ORIGIN, resolve
from vllm_instant.deployment.slots import SLOTS, Slot
from vllm_instant.interfaces.deployment import Deployment
from vllm_instant.interfaces.plugins import Plugin, PluginOptions
from vllm_instant.tools.cli.common import (
    DeploymentPath,
    Overrides,
    fail,
    print_columns,
    problems_reported,
    quiet_logging,
    toml_value,
    working,
)

app = typer.Typer(help="Write, check and show deployment files.", no_args_is_help=True)


@app.command()
def init(
    path: Annotated[Path, typer.Argument(help="File to write.")] = Path("deploy.toml"),
    force: Annotated[bool, typer.Option("--force", help="Overwrite an existing file.")] = False,
) -> None:
    """Write a commented deployment file with every slot, plugin and option at its default."""
    if path.exists() and not force:
        fail(f"{path} exists; --force overwrites it")
    try:
        path.write_text(template(), encoding="utf-8")
    except OSError as error:
        fail(f"{path} cannot be written: {error.strerror}")
    print(f"Wrote {path}. Serve it with: vllm serve MODEL --plugins vllm_instant --instant-config {path}")


@app.command()
def check(path: DeploymentPath = None, overrides: Overrides = None) -> None:
    """Check a deployment file without starting an engine; prints one line per error and exits with code 2."""
    with problems_reported():
        deployment = resolve(path, overrides or ())
        if find_spec("vllm") is not None:
            with quiet_logging(), working("Asking vLLM about the [vllm] table …"):
                from vllm_instant.patches.engine_options import check_with_vllm

                check_with_vllm(deployment)
        elif deployment.vllm:
            print("vLLM is not installed here: the [vllm] table was not checked", file=sys.stderr)
    chosen = ", ".join(f"{slot}={choice.plugin}" for slot, choice in deployment.slots.items())
    print(f"{deployment.file or 'defaults'}: ok ({chosen})")


@app.command()
def show(path: DeploymentPath = None, overrides: Overrides = None) -> None:
    """Print the effective values, with secrets masked, and the source of each."""
    with problems_reported():
        deployment = resolve(path, overrides or ())
    print_columns(
        ("key", "value", "from"),
        (
            (key, toml_value(masked(value, key)) if value is not None else "not set", origin)
            for key, value, origin in effective(deployment)
        ),
    )


def effective(deployment: Deployment) -> Iterator[tuple[str, Any, str]]:
    """Every value of a deployment as ``(key, value, origin)``, with the engine arguments of its plugins."""
    for slot, choice in deployment.slots.items():
        for name, value in {"plugin": choice.plugin, **choice.options}.items():
            key = f"{slot}.{name}"
            yield key, value, deployment.origins.get(key, DEFAULT_ORIGIN)
    for name, value in engine_arguments(deployment).items():
        origin = next(
            (origin for key, origin in deployment.origins.items() if f"{key}.".startswith(f"vllm.{name}.")),
            "[drafter]",
        )
        yield f"vllm.{name}", value, origin


def template() -> str:
    """A deployment file with the plugins of every slot, and all options at their defaults as comments."""
    lines = [
        "# Deployment file of vllm-instant. Every value below is the default; lines that begin with # are optional.",
        "# Serve with: vllm serve MODEL --plugins vllm_instant --instant-config THIS_FILE",
        "",
    ]
    for slot in SLOTS.values():
        lines += [*_table(slot), ""]
    lines += [
        "# Any argument of `vllm serve`, by its name. The command line wins over this table.",
        "[vllm]",
        "# max_num_seqs = 64",
        '# speculative_config = { method = "ngram", num_speculative_tokens = 4 }',
    ]
    return "\n".join(lines) + "\n"


def _table(slot: Slot) -> Iterator[str]:
    yield f"# {slot.name}: {slot.decides} (decided in the {slot.runs_in})."
    plugins = [found.plugin for found in plugin_manager().installed_plugins() if found.plugin.slot == slot.name]
    plugins.sort(key=lambda plugin: plugin.name != slot.default)
    for plugin in plugins:
        lossy = " LOSSY: answers may change." if plugin.lossy else ""
        yield f"#   {plugin.name}: {plugin.summary}.{lossy}"
    yield f"[{slot.name}]"
    chosen = f"plugin = {toml_value(slot.default)}"
    # An optional default serves only where it takes nothing away; a plugin that is named serves everywhere.
    yield f"# {chosen}   # the default, where it costs nothing; uncommented: everywhere" if slot.optional else chosen
    yield from _options_of(plugins)


def _options_of(plugins: Sequence[Plugin]) -> Iterator[str]:
    """The options of a slot's plugins, each group under the names of the plugins that take it.

    Options that one plugin inherits from another's are printed once, for both.
    """
    types = dict.fromkeys(plugin.options for plugin in plugins)
    for options in types:
        extended = [other for other in types if other is not options and _extends(options, other)]
        known = {name for other in extended for name in other.model_fields}
        fields = {name: field for name, field in options.model_fields.items() if name not in known}
        if fields:
            takers = [toml_value(plugin.name) for plugin in plugins if _extends(plugin.options, options)]
            yield f"# {'More options' if known else 'Options'} of plugin = {' or '.join(takers)}:"
            yield from (_option(name, field) for name, field in fields.items())


def _extends(options: type[PluginOptions], base: type[PluginOptions]) -> bool:
    """Whether these are the options of a base, all of them unchanged, and perhaps more."""

    def described(model: type[PluginOptions], name: str) -> tuple[Any, str | None]:
        return model.model_fields[name].default, model.model_fields[name].description

    return issubclass(options, base) and all(described(options, n) == described(base, n) for n in base.model_fields)


def _option(name: str, field: FieldInfo) -> str:
    if field.is_required():
        shown = f"{name} = ... (required)"
    elif field.default is None:
        shown = f"{name} is not set"
    else:
        shown = f"{name} = {toml_value(_plain(field.default))}"
    return f"# {shown} ".ljust(44) + (f"# {field.description}" if field.description else "")


def _plain(default: Any) -> Any:
    return default.model_dump(mode="json") if isinstance(default, PluginOptions) else default
