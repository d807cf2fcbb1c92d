"""The ``[vllm]`` table as arguments of vLLM's command line."""

from __future__ import annotations

import argparse
import json
from typing import Any

from vllm_instant.deployment.errors import DeploymentError, Problem, choices, shown
from vllm_instant.deployment.resolved import engine_arguments
from vllm_instant.interfaces.deployment import Deployment

# Options that choose the deployment itself; inside of one they would be circular.
_NOT_INSIDE = {"plugins", "instant_config", "instant_set", "config", "help"}


def as_arguments(
    parser: argparse.ArgumentParser, deployment: Deployment, typed: list[str], model_typed: bool = False
) -> list[str]:
    """The engine arguments of a deployment that the user did not give on the command line.

    Args:
        parser: the parser that will read them.
        deployment: what to serve.
        typed: the command line, with vLLM's own YAML file already expanded.
        model_typed: whether the command line has a MODEL.

    Returns:
        Words to insert before the options that the user typed.

    Raises:
        DeploymentError: a key is no option of vLLM, or vLLM cannot read its value.

    """
    known: dict[str, argparse.Action] = parser._option_string_actions
    given, dotted = _given(known, typed)
    words: list[str] = []
    problems: list[Problem] = []
    for key, value in engine_arguments(deployment).items():
        option = "--" + key.replace("_", "-")
        action = known.get(option)
        message = _objection(parser, action, key, value)
        if message is not None:
            source = deployment.origins.get(f"vllm.{key}", deployment.file or "deployment")
            problems.append(Problem(source, f"[vllm] {key}", message))
        elif action is None or id(action) in given or (key == "model" and model_typed):
            continue
        elif isinstance(value, dict):
            prefix, present = dotted.get(id(action), (option, set()))
            words += _flatten(prefix, value, present)
        elif isinstance(value, bool):
            words += _switch(option, value, action, known)
        elif isinstance(value, list):
            words += _list_words(parser, option, action, value)
        else:
            words.append(f"{option}={value}")
    if problems:
        raise DeploymentError(problems)
    return words


def _objection(parser: argparse.ArgumentParser, action: argparse.Action | None, key: str, value: Any) -> str | None:
    """What is wrong with a key or value, judged by vLLM's own options and converters; None if nothing is."""
    if action is None or key in _NOT_INSIDE:
        options = (name[2:].replace("-", "_") for name in parser._option_string_actions if name.startswith("--"))
        return f"vLLM has no such engine argument; {choices(key, set(options) - _NOT_INSIDE)}"
    is_switch = isinstance(action, argparse._StoreTrueAction | argparse.BooleanOptionalAction)
    if is_switch != isinstance(value, bool):
        return f"expected {'true or false' if is_switch else 'a value'}, found {shown(value)}"
    if isinstance(value, bool | dict):
        return None
    if isinstance(value, list):
        texts = _items(value) if _takes_items(action) else [_one_text(parser, action, value)]
    else:
        texts = [str(value)]
    for text in texts:
        try:
            parser._check_value(action, parser._get_value(action, text))
        except argparse.ArgumentError as error:
            return f"{error.message} (found {shown(value)})"
    return None


def check_with_vllm(deployment: Deployment) -> None:
    """Raise DeploymentError if vLLM refuses the engine arguments; builds vLLM's parser, which takes seconds."""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    as_arguments(make_arg_parser(FlexibleArgumentParser()), deployment, [])


def _given(known: dict[str, argparse.Action], typed: list[str]) -> tuple[set[int], dict[int, tuple[str, set[str]]]]:
    """The options that the user typed: whole ones, and single keys of JSON options (``--speculative-config.method``).

    The keys come with the spelling of their option: vLLM merges dotted keys by that spelling, ``-sc`` or long.
    """
    whole: set[int] = set()
    dotted: dict[int, tuple[str, set[str]]] = {}
    for word in typed:
        if not word.startswith("-"):
            continue
        name = word.partition("=")[0]
        head, dot, rest = name.partition(".")
        head = "--" + head[2:].replace("_", "-") if head.startswith("--") else head
        action = known.get(head)
        if action is None:
            continue
        if dot:
            dotted.setdefault(id(action), (head, set()))[1].add(f"{head}.{rest}".rstrip("+"))
        else:
            whole.add(id(action))
    return whole, dotted


def _flatten(prefix: str, table: dict[str, Any], present: set[str]) -> list[str]:
    """A table as dotted arguments, so that single keys on the command line override single keys here."""
    words: list[str] = []
    for key, value in table.items():
        path = f"{prefix}.{key}"
        if path in present:
            continue
        if isinstance(value, dict) and value:
            words += _flatten(path, value, present)
        else:
            words.append(f"{path}={json.dumps(value)}")
    return words


def _takes_items(action: argparse.Action) -> bool:
    """Whether an option takes a list item by item, in several words (``nargs``) or several times (``append``)."""
    return isinstance(action, argparse._AppendAction) or action.nargs not in (None, "?")


def _items(values: list[Any]) -> list[str]:
    return [value if isinstance(value, str) else json.dumps(value) for value in values]


def _list_words(parser: argparse.ArgumentParser, option: str, action: argparse.Action, values: list[Any]) -> list[str]:
    if not _takes_items(action):
        return [f"{option}={_one_text(parser, action, values)}"]
    if isinstance(action, argparse._AppendAction):
        return [f"{option}={text}" for text in _items(values)]
    return [option, *_items(values)] if values or action.nargs == "*" else []


def _one_text(parser: argparse.ArgumentParser, action: argparse.Action, values: list[Any]) -> str:
    """A list in one word: JSON where vLLM converts it to a list, otherwise comma-separated."""
    text = json.dumps(values)
    try:
        if isinstance(parser._get_value(action, text), list):
            return text
    except argparse.ArgumentError:
        pass
    return ",".join(_items(values))


def _switch(option: str, value: bool, action: argparse.Action, known: dict[str, argparse.Action]) -> list[str]:
    if value:
        return [option]
    negation = f"--no-{option[2:]}"
    return [negation] if known.get(negation) is action else []
