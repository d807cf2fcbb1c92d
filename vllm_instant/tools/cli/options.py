"""The options of a command as one model: declared once, given to the command as one object."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Annotated, Any, TypeVar

import typer
from pydantic import BaseModel, ConfigDict
from typer.models import ParameterInfo


class CommandOptions(BaseModel):
    """Base of a command's options: every field is annotated with its ``typer.Argument`` or ``typer.Option``."""

    model_config = ConfigDict(frozen=True, arbitrary_types_allowed=True)


Options = TypeVar("Options", bound=CommandOptions)


def takes(options: type[Options]) -> Callable[[Callable[[Options, list[str]], None]], Callable[..., None]]:
    """Make a function of an options object a command for Typer; its second argument is the words left over."""

    def decorate(function: Callable[[Options, list[str]], None]) -> Callable[..., None]:
        def command(click_context: typer.Context, **given: Any) -> None:
            function(options(**given), click_context.args)

        context = inspect.Parameter("click_context", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context)
        parameters = [context, *_parameters(options)]
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        command.__doc__, command.__name__ = function.__doc__, function.__name__
        return command

    return decorate


def _parameters(options: type[CommandOptions]) -> list[inspect.Parameter]:
    found = []
    for name, field in options.model_fields.items():
        [info] = [metadata for metadata in field.metadata if isinstance(metadata, ParameterInfo)]
        default = inspect.Parameter.empty if field.is_required() else field.default
        annotation = Annotated[field.annotation, info]  # type: ignore[name-defined]
        found.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation))
    return found
