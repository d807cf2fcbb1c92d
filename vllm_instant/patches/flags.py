"""Selection: ``--plugins``, ``--instant-config`` and ``--instant-set`` on vLLM's command line, and ``LLM(...)``.

vLLM has no registration point for command-line options, so its argument parser is wrapped; without selection this is
the only change that the package makes. The ``[vllm]`` table becomes arguments before the user's own: vLLM
then validates them itself, and the command line overrides its YAML file, which overrides the deployment file.
"""

from __future__ import annotations

import argparse
import dataclasses
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
from vllm_instant.patches.names import ARGUMENT_PARSER, ENGINE_ARGUMENTS
from vllm_instant.patches.names import QUALIFIED_NAME as SCHEDULER

PACKAGE = "vllm_instant"
ADDITIONAL_CONFIG_KEY = "vllm_instant"
SELECT_HINT = "add --plugins vllm_instant"

Serve = Callable[[Deployment, bool], None]
"""Called with a selected deployment, and whether the server has a drafter."""

_serve: Serve | None = None


def on_selection(serve: Serve) -> None:
    """Call ``serve`` when a command line or ``LLM(...)`` selects a deployment."""
    global _serve
    _serve = serve


# ------------------------------------------------------------------------------------------- the flags


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _add_options(target: Any, known: Any = ()) -> None:
    """Add this package's options to a parser or group. ``--plugins`` takes one word, so that MODEL may follow it."""
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


def _add_cli_args(add: Any, parser: Any, *args: Any, **kwargs: Any) -> Any:
    parser = add(parser, *args, **kwargs)
    if "--instant-config" not in parser._option_string_actions:
        group = parser.add_argument_group("InstantConfig", "Plugin selection and the deployment file of vllm-instant.")
        _add_options(group, parser._option_string_actions)
    return parser


@dataclasses.dataclass(frozen=True)
class Selection:
    """Options of this package as given on a command line, before vLLM parses it."""

    plugins: list[str] | None
    config: str | None
    overrides: list[str]

    @property
    def selected(self) -> bool:
        """Whether vllm-instant is selected by name, on the command line or in ``VLLM_PLUGINS``."""
        names = self.plugins if self.plugins is not None else _names(os.environ.get("VLLM_PLUGINS", ""))
        return PACKAGE in names


def read_selection(arguments: list[str]) -> Selection:
    """Extract this package's options from a command line; everything else is left to vLLM."""
    found, _ = _pick(arguments)
    if found is None:
        return Selection(None, None, [])
    # Some versions of vLLM have a --plugins of their own that takes several words.
    plugins = [name for text in found.plugins for name in _names(text)] if found.plugins is not None else None
    return Selection(plugins, found.instant_config, list(found.instant_set or []))


def _pick(arguments: list[str]) -> tuple[argparse.Namespace | None, list[str]]:
    """Options of this package and the remaining words; None for a line that vLLM's parser will refuse."""
    picker = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    _add_options(picker)
    try:
        return picker.parse_known_args([_with_dashes(argument) for argument in arguments])
    except argparse.ArgumentError:
        return None, arguments


def _own_options_last(arguments: list[str]) -> list[str]:
    """The same line with this package's options at the end, because vLLM expects MODEL as the first word."""
    found, rest = _pick(arguments)
    if found is None:
        return arguments
    plugins = [f"--plugins={text}" for text in found.plugins or ()]
    config = [f"--instant-config={found.instant_config}"] if found.instant_config is not None else []
    return [*rest, *plugins, *config, *(f"--instant-set={pair}" for pair in found.instant_set or ())]


def _with_dashes(argument: str) -> str:
    """The word with dashes if it is an option of this package, which may be written with underscores."""
    name, equals, value = argument.partition("=")
    dashed = name.replace("_", "-")
    return dashed + equals + value if dashed in ("--plugins", "--instant-config", "--instant-set") else argument


# ------------------------------------------------------------------------------- vllm serve and friends


def _load_config_file(load: Any, parser: Any, file_path: str) -> list[str]:
    """Join lists: a YAML list becomes several words after its option, and this package's options take one each."""
    joined: list[str] = []
    option = ""
    for word in load(file_path):
        if word.startswith("--"):
            option = _with_dashes(word)
            joined.append(word)
        elif option in ("--plugins", "--instant-set") and not joined[-1].startswith("--"):
            joined += [option, word]
        else:
            joined.append(word)
    return joined


def _pull_args_from_config(pull: Any, parser: Any, args: list[str]) -> list[str]:
    return _expand(parser, pull(args))


def _parse_args(parse: Any, parser: Any, args: list[str] | None = None, namespace: Any = None) -> Any:
    arguments = list(sys.argv[1:] if args is None else args)
    # vLLM also parses lists that it makes itself, for example an empty one to learn the defaults.
    if args is not None and not _selects(parser, arguments):
        return parse(args, namespace)
    arguments = _own_options_last(arguments)
    # With --config vLLM expands its YAML file first, and ``_pull_args_from_config`` above expands the deployment.
    if "--config" not in arguments:
        arguments = _expand(parser, arguments)
    parsed = parse(arguments, namespace)
    if hasattr(parsed, "instant_config"):
        _select(parsed)
    return parsed


def _selects(parser: Any, arguments: list[str]) -> bool:
    if "--config" in arguments:
        arguments = parser._pull_args_from_config(arguments)
    selection = read_selection(arguments)
    return bool(selection.plugins or selection.config or selection.overrides)


def _fail(error: DeploymentError) -> NoReturn:
    for problem in error.problems:
        print(f"vllm-instant: {problem}", file=sys.stderr)
    raise SystemExit(EXIT_CODE)


def _expand(parser: Any, arguments: list[str]) -> list[str]:
    """Insert the engine arguments of the deployment before the user's own."""
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
    """The parser that will read the options, the position of the first option, and whether MODEL is given."""
    position = 0
    while position < len(arguments) and not arguments[position].startswith("-"):
        subparsers = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
        if not subparsers or arguments[position] not in subparsers[0].choices:
            break
        parser = subparsers[0].choices[arguments[position]]
        position += 1
    model_first = position < len(arguments) and not arguments[position].startswith("-")
    # MODEL may also follow options; argparse finds it.
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


def _select(parsed: Any) -> None:
    """Act on parsed options: allow the plugins in all processes, name the scheduler, and serve the deployment."""
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
    global _from_command_line
    _from_command_line = True
    try:
        deployment = settings.resolve(selection.config, selection.overrides)
        speculates = _take_scheduler(parsed, deployment)
        refuse_unreadable_cache(parsed)
        if _serve is not None:
            _serve(deployment, speculates)
    except DeploymentError as error:
        _fail(error)


def _take_scheduler(arguments: Any, deployment: Deployment) -> bool:
    """Set this package's scheduler in parsed options or EngineArgs if it is needed; returns whether it speculates."""
    asked = getattr(arguments, "scheduler_cls", None)
    replaced = asked not in (None, SCHEDULER)
    schedules = installed_plugin(deployment, "batching").plugin.build is not None
    speculates = deployment.slots["speculation"].plugin != "off" and (
        chooses_drafter(arguments) or (not replaced and may_be_used(arguments, deployment))
    )
    if not (speculates or schedules):
        if not replaced and installed_plugin(deployment, "streaming").plugin.build is not None:
            # With this scheduler sessions can pin KV blocks; under another one they cannot.
            arguments.scheduler_cls = SCHEDULER
        return False
    if replaced:
        remedies = [*(["speculation.plugin=off"] * speculates), *(["batching.plugin=fcfs"] * schedules)]
        message = (
            f"{asked} replaces the scheduler that serves the deployment's policies: "
            f"remove it, or set {' and '.join(remedies)}"
        )
        raise DeploymentError([Problem("--scheduler-cls", "", message)])
    arguments.scheduler_cls = SCHEDULER
    return speculates


def _active_platform_plugins() -> list[str]:
    """Entry points of the out-of-tree platform in use: without them the child processes would lose the device."""
    from importlib.metadata import entry_points

    from vllm.platforms import current_platform

    package = type(current_platform).__module__.split(".")[0]
    if package == "vllm":
        return []
    return [e.name for e in entry_points(group="vllm.platform_plugins") if e.module.split(".")[0] == package]


# --------------------------------------------------------------------------------------------- LLM(...)

_published_offline = False
_from_command_line = False
"""Whether a command line has selected the deployment: its errors are sentences, without a traceback."""


def _create_engine_config(create: Any, engine_args: Any, *args: Any, **kwargs: Any) -> Any:
    _select_offline(engine_args)
    try:
        return create(*args, **kwargs)
    except DeploymentError as error:
        if _from_command_line:
            _fail(error)
        raise


def _select_offline(engine_args: Any) -> None:
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
    if _serve is not None:
        _serve(deployment, speculates)
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
    wraps={
        f"{ENGINE_ARGUMENTS}:EngineArgs.add_cli_args": _add_cli_args,
        f"{ENGINE_ARGUMENTS}:EngineArgs.create_engine_config": _create_engine_config,
        f"{ARGUMENT_PARSER}:FlexibleArgumentParser.load_config_file": _load_config_file,
        f"{ARGUMENT_PARSER}:FlexibleArgumentParser._pull_args_from_config": _pull_args_from_config,
        f"{ARGUMENT_PARSER}:FlexibleArgumentParser.parse_args": _parse_args,
    },
)
