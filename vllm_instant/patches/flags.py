"""Selection: ``--plugins``, ``--instant-config`` and ``--instant-set`` on vLLM's command line, and ``LLM(...)``.

vLLM has no registration point for command-line options, so its argument parser is wrapped; this is the only change
that an unselected package makes. The ``[vllm]`` table becomes arguments in front of those that the user typed: vLLM
then validates them itself, and the command line wins over its YAML file, which wins over the deployment file.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import os
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from vllm_instant.deployment import deployment_env, settings
from vllm_instant.deployment.errors import EXIT_CODE, DeploymentError, Problem
from vllm_instant.deployment.resolved import engine_arguments, installed_plugin
from vllm_instant.interfaces.deployment import Deployment
from vllm_instant.patches.attention import refuse_unreadable_cache
from vllm_instant.patches.compat import HasAttribute, HasSignature, References, VllmPatch
from vllm_instant.patches.default_drafter import chooses_drafter, may_be_used
from vllm_instant.patches.engine_options import as_arguments
from vllm_instant.patches.scheduler import QUALIFIED_NAME as SCHEDULER

PACKAGE = "vllm_instant"
ADDITIONAL_CONFIG_KEY = "vllm_instant"
SELECT_HINT = "add --plugins vllm_instant"

Serve = Callable[[Deployment, bool], None]
"""What happens when a deployment was selected: the deployment, and whether the server has a drafter."""


def install(serve: Serve) -> None:
    """Offer the flags on every parser that takes engine arguments, and call ``serve`` on selection; idempotent."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    if getattr(FlexibleArgumentParser, "_instant_flags", False):
        return
    FlexibleArgumentParser._instant_flags = True
    EngineArgs.add_cli_args = staticmethod(_with_flags(EngineArgs.add_cli_args))
    EngineArgs.create_engine_config = _with_offline_selection(EngineArgs.create_engine_config, serve)
    FlexibleArgumentParser.load_config_file = _with_joined_lists(FlexibleArgumentParser.load_config_file)
    FlexibleArgumentParser._pull_args_from_config = _with_expansion(FlexibleArgumentParser._pull_args_from_config)
    FlexibleArgumentParser.parse_args = _with_selection(FlexibleArgumentParser.parse_args, serve)


# ------------------------------------------------------------------------------------------- the flags


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _add_options(target: Any, known: Any = ()) -> None:
    """Our options on a parser or group. ``--plugins`` takes one word, so that it never swallows MODEL."""
    if "--plugins" not in known:
        target.add_argument(
            "--plugins",
            action="append",
            default=None,
            metavar="NAME[,NAME...]",
            help="vLLM plugins to load, by name; sets VLLM_PLUGINS. `vllm_instant` selects vllm-instant.",
        )
    target.add_argument(
        "--instant-config",
        default=None,
        metavar="PATH",
        help="Deployment file (TOML) of vllm-instant; the variable INSTANT_CONFIG does the same.",
    )
    target.add_argument(
        "--instant-set",
        action="append",
        default=None,
        metavar="TABLE.KEY=VALUE",
        help="Override one value of the deployment file, for example speculation.plugin=off.",
    )


def _with_flags(original: Any) -> Any:
    @functools.wraps(original)
    def add_cli_args(parser: Any, *args: Any, **kwargs: Any) -> Any:
        parser = original(parser, *args, **kwargs)
        if "--instant-config" not in parser._option_string_actions:
            group = parser.add_argument_group(
                "InstantConfig", "Plugin selection and the deployment file of vllm-instant."
            )
            _add_options(group, parser._option_string_actions)
        return parser

    return add_cli_args


@dataclasses.dataclass(frozen=True)
class Selection:
    """Our own options as given on a command line, before vLLM parses it."""

    plugins: list[str] | None
    config: str | None
    overrides: list[str]

    @property
    def selected(self) -> bool:
        """Whether vllm-instant was asked for by name, on the command line or in ``VLLM_PLUGINS``."""
        names = self.plugins if self.plugins is not None else _names(os.environ.get("VLLM_PLUGINS", ""))
        return PACKAGE in names


def read_selection(arguments: list[str]) -> Selection:
    """Pick our options out of a command line; everything else is left to vLLM."""
    found, _ = _pick(arguments)
    if found is None:
        return Selection(None, None, [])
    # A vLLM whose --plugins takes several words is read as that vLLM would.
    plugins = [name for text in found.plugins for name in _names(text)] if found.plugins is not None else None
    return Selection(plugins, found.instant_config, list(found.instant_set or []))


def _pick(arguments: list[str]) -> tuple[argparse.Namespace | None, list[str]]:
    """Our options, and the words that are left; None for a line that vLLM's parser will have to complain about."""
    picker = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    _add_options(picker)
    try:
        return picker.parse_known_args([_with_dashes(argument) for argument in arguments])
    except argparse.ArgumentError:
        return None, arguments


def _ours_last(arguments: list[str]) -> list[str]:
    """The same line with our options behind everything else: vLLM wants MODEL to be the first word."""
    found, rest = _pick(arguments)
    if found is None:
        return arguments
    plugins = [f"--plugins={text}" for text in found.plugins or ()]
    config = [f"--instant-config={found.instant_config}"] if found.instant_config is not None else []
    return [*rest, *plugins, *config, *(f"--instant-set={pair}" for pair in found.instant_set or ())]


def _with_dashes(argument: str) -> str:
    """Our own options may be written with underscores, as vLLM's may; no other word is touched."""
    name, equals, value = argument.partition("=")
    dashed = name.replace("_", "-")
    return dashed + equals + value if dashed in ("--plugins", "--instant-config", "--instant-set") else argument


# ------------------------------------------------------------------------------- vllm serve and friends


def _with_joined_lists(original: Any) -> Any:
    @functools.wraps(original)
    def load_config_file(self: Any, file_path: str) -> list[str]:
        """A YAML list arrives as several words after its option; our options take one word each."""
        joined: list[str] = []
        option = ""
        for word in original(self, file_path):
            if word.startswith("--"):
                option = _with_dashes(word)
                joined.append(word)
            elif option in ("--plugins", "--instant-set") and not joined[-1].startswith("--"):
                joined += [option, word]
            else:
                joined.append(word)
        return joined

    return load_config_file


def _with_expansion(original: Any) -> Any:
    @functools.wraps(original)
    def _pull_args_from_config(self: Any, args: list[str]) -> list[str]:
        return _expand(self, original(self, args))

    return _pull_args_from_config


def _with_selection(original: Any, serve: Serve) -> Any:
    @functools.wraps(original)
    def parse_args(self: Any, args: list[str] | None = None, namespace: Any = None) -> Any:
        arguments = list(sys.argv[1:] if args is None else args)
        # vLLM also parses lists of its own making, an empty one to learn the defaults for example.
        if args is not None and not _asks_for_us(self, arguments):
            return original(self, args, namespace)
        arguments = _ours_last(arguments)
        # With --config, vLLM expands its YAML file first and our wrapper around that does the rest.
        if "--config" not in arguments:
            arguments = _expand(self, arguments)
        parsed = original(self, arguments, namespace)
        if hasattr(parsed, "instant_config"):
            _select(parsed, serve)
        return parsed

    return parse_args


def _asks_for_us(parser: Any, arguments: list[str]) -> bool:
    if "--config" in arguments:
        arguments = parser._pull_args_from_config(arguments)
    selection = read_selection(arguments)
    return bool(selection.plugins or selection.config or selection.overrides)


def _fail(error: DeploymentError) -> NoReturn:
    for problem in error.problems:
        print(f"vllm-instant: {problem}", file=sys.stderr)
    raise SystemExit(EXIT_CODE)


def _expand(parser: Any, arguments: list[str]) -> list[str]:
    """Put what the deployment asks of vLLM in front of what the user typed."""
    selection = read_selection(arguments)
    if not selection.selected:
        return arguments
    target, position, model_typed = _target(parser, arguments)
    if "--instant-config" not in target._option_string_actions:
        return arguments
    try:
        deployment = settings.resolve(selection.config, selection.overrides)
        extra = as_arguments(target, deployment, arguments, model_typed)
    except DeploymentError as error:
        _fail(error)
    return arguments[:position] + extra + arguments[position:]


def _target(parser: Any, arguments: list[str]) -> tuple[Any, int, bool]:
    """The parser that will read the options, where options begin, and whether a MODEL stands before them."""
    position = 0
    while position < len(arguments) and not arguments[position].startswith("-"):
        subparsers = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
        if not subparsers or arguments[position] not in subparsers[0].choices:
            break
        parser = subparsers[0].choices[arguments[position]]
        position += 1
    model_first = position < len(arguments) and not arguments[position].startswith("-")
    # With options before it, MODEL is somewhere behind; argparse knows where.
    model_typed = model_first or _finds_model(parser, arguments[position:])
    return parser, position + model_first, model_typed


def _finds_model(parser: Any, options: list[str]) -> bool:
    positionals = [action.dest for action in parser._get_positional_actions()]
    if not positionals:
        return False
    try:
        found, _ = argparse.ArgumentParser.parse_known_args(parser, options)
    except SystemExit:
        return False
    return any(getattr(found, dest, None) is not None for dest in positionals)


def _select(parsed: Any, serve: Serve) -> None:
    """Act on the parsed options: allow the plugins in all processes, publish the deployment, take our scheduler."""
    words = getattr(parsed, "plugins", None)
    plugins = [name for text in words for name in _names(text)] if words is not None else None
    selection = Selection(plugins, parsed.instant_config, list(parsed.instant_set or []))
    if not selection.selected:
        deployment_env.clear_deployment()
        for option, value in (("--instant-config", selection.config), ("--instant-set", selection.overrides)):
            if value:
                _fail(DeploymentError([Problem(option, "", f"has no effect without the plugin: {SELECT_HINT}")]))
    if plugins is not None:
        os.environ["VLLM_PLUGINS"] = ",".join(dict.fromkeys([*plugins, *_active_platform_plugins()]))
    if not selection.selected:
        return
    try:
        deployment = settings.resolve(selection.config, selection.overrides)
        speculates = _take_scheduler(parsed, deployment)
        refuse_unreadable_cache(parsed)
        serve(deployment, speculates)
    except DeploymentError as error:
        _fail(error)


def _take_scheduler(arguments: Any, deployment: Deployment) -> bool:
    """Name our scheduler on parsed options or EngineArgs if it has something to do; says whether that is drafts."""
    asked = getattr(arguments, "scheduler_cls", None)
    replaced = asked not in (None, SCHEDULER)
    batches = installed_plugin(deployment, "batching").plugin.build is not None
    speculates = deployment.slots["speculation"].plugin != "off" and (
        chooses_drafter(arguments) or (not replaced and may_be_used(arguments, deployment))
    )
    if not (speculates or batches):
        if not replaced and installed_plugin(deployment, "streaming").plugin.build is not None:
            # Sessions may hold KV blocks there; under another scheduler they go without.
            arguments.scheduler_cls = SCHEDULER
        return False
    if replaced:
        remedies = [*(["speculation.plugin=off"] * speculates), *(["batching.plugin=fcfs"] * batches)]
        message = (
            f"{asked} replaces the scheduler that serves the deployment's policies: "
            f"remove it, or set {' and '.join(remedies)}"
        )
        raise DeploymentError([Problem("--scheduler-cls", "", message)])
    arguments.scheduler_cls = SCHEDULER
    return speculates


def _active_platform_plugins() -> list[str]:
    """Entry points of an out-of-tree platform in use: filtering them out of the children would lose the device."""
    from importlib.metadata import entry_points

    from vllm.platforms import current_platform

    package = type(current_platform).__module__.split(".")[0]
    if package == "vllm":
        return []
    return [e.name for e in entry_points(group="vllm.platform_plugins") if e.module.split(".")[0] == package]


# --------------------------------------------------------------------------------------------- LLM(...)

_published_offline = False


def _with_offline_selection(original: Any, serve: Serve) -> Any:
    @functools.wraps(original)
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        _select_offline(self, serve)
        return original(self, *args, **kwargs)

    return create_engine_config


def _select_offline(engine_args: Any, serve: Serve) -> None:
    """``LLM(..., additional_config={"vllm_instant": "deploy.toml"})``; ``True`` takes the defaults.

    The key is taken out again: vLLM hashes ``additional_config`` into its compilation cache key.
    """
    global _published_offline
    additional = engine_args.additional_config
    if not isinstance(additional, dict) or ADDITIONAL_CONFIG_KEY not in additional:
        if _published_offline:
            deployment_env.clear_deployment()
            _published_offline = False
        return
    file = additional[ADDITIONAL_CONFIG_KEY]
    if not (file is True or isinstance(file, str | os.PathLike)):
        message = f"expected the path of a deployment file, or True for the defaults; found {file!r}"
        raise DeploymentError([Problem("additional_config", ADDITIONAL_CONFIG_KEY, message)])
    deployment = settings.resolve(None if file is True else os.fspath(file))
    known = {field.name: field for field in dataclasses.fields(engine_args)}
    problems = []
    for key, value in engine_arguments(deployment).items():
        field = known.get(key)
        if field is None:
            problems.append(Problem(str(file), f"[vllm] {key}", "is no argument of vllm.LLM(...)"))
        elif getattr(engine_args, key) == _default(field):
            setattr(engine_args, key, value)
    if problems:
        raise DeploymentError(problems)
    speculates = _take_scheduler(engine_args, deployment)
    refuse_unreadable_cache(engine_args)
    engine_args.additional_config = {k: v for k, v in additional.items() if k != ADDITIONAL_CONFIG_KEY}
    serve(deployment, speculates)
    _published_offline = True


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else None


_PARSER = "utils/argparse_utils.py"

PATCH = VllmPatch(
    name="flags",
    purpose="--plugins, --instant-config, --instant-set and LLM(additional_config=...)",
    requirements=(
        HasSignature("engine/arg_utils.py", "EngineArgs.add_cli_args", ("parser",)),
        HasSignature("engine/arg_utils.py", "EngineArgs.create_engine_config", ("self",)),
        References("engine/arg_utils.py", "AsyncEngineArgs.add_cli_args", ("load_general_plugins", "add_cli_args")),
        References("engine/arg_utils.py", "EngineArgs.__post_init__", ("load_general_plugins",)),
        HasAttribute("engine/arg_utils.py", "EngineArgs.additional_config"),
        HasAttribute("engine/arg_utils.py", "EngineArgs.scheduler_cls"),
        HasAttribute("engine/arg_utils.py", "EngineArgs.speculative_config"),
        HasSignature(_PARSER, "FlexibleArgumentParser.parse_args", ("self", "args", "namespace")),
        HasSignature(_PARSER, "FlexibleArgumentParser._pull_args_from_config", ("self", "args")),
        HasSignature(_PARSER, "FlexibleArgumentParser.load_config_file", ("self", "file_path")),
        References(_PARSER, "FlexibleArgumentParser.parse_args", ("_pull_args_from_config",)),
        References("plugins/__init__.py", "load_plugins_by_group", ("VLLM_PLUGINS",)),
    ),
)
