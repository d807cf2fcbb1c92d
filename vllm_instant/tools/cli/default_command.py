"""A command with subcommands that can still be called without one, as it was before it had any."""

from __future__ import annotations

from typing import Any

from typer.core import TyperGroup


class DefaultCommandGroup(TyperGroup):
    """Words that begin with no subcommand are those of ``default``, ``--help`` included."""

    default = "run"

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Insert the default command; a scenario that is called like it can be given as a path."""
        return super().parse_args(ctx, args if args and args[0] in self.commands else [self.default, *args])
