"""A command with subcommands that can still be called without one, as it was before it had any."""

from __future__ import annotations

from typing import Any

from typer.core import TyperCommand, TyperGroup


class DefaultCommandGroup(TyperGroup):
    """Words that begin with no subcommand are those of ``default``, ``--help`` included."""

    default = "run"

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Insert the default command; a scenario that is called like it can be given as a path."""
        return super().parse_args(ctx, args if args and args[0] in self.commands else [self.default, *args])


class DefaultCommand(TyperCommand):
    """The default command, whose usage shows how it is called: without its name."""

    def get_usage(self, ctx: Any) -> str:
        """As of any command, without ``run``."""
        return str(super().get_usage(ctx)).replace(f" {DefaultCommandGroup.default} ", " ", 1)
