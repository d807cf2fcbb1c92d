"""The guard plugins: their options and how they are built."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pydantic import Field

from vllm_instant import Deployment, Plugin, PluginContext
from vllm_instant.interfaces.guard import Action, Guard, GuardOptions


class RulesOptions(GuardOptions):
    """Options of ``rules``."""

    words: tuple[str, ...] = Field((), description="Words and phrases that are not allowed.")
    words_file: str | None = Field(
        None, description="A text file with more of them, one per line; lines that begin with # are comments."
    )
    patterns: tuple[str, ...] = Field(
        (), description="Regular expressions that are not allowed, without lookaround and references to groups."
    )
    patterns_file: str | None = Field(None, description="A text file with more of them, one per line.")
    action: Literal["stop", "replace", "escalate"] = Field(
        "stop",
        description="What is done with a match: the answer is stopped before it, the match is replaced, or the next "
        "tier decides.",
    )
    replacement: str = Field("***", description="The text in the place of a replaced match.")
    whole_words: bool = Field(True, description="Whether a word only counts where it is not part of a longer one.")
    homoglyphs: bool = Field(
        True, description="Whether letters of other scripts count as the ASCII letters that they look like."
    )
    max_match_characters: int = Field(
        128, ge=1, le=4096, description="Maximum length of a match of a regular expression; a longer one is not found."
    )


def _lines(path: str | None) -> tuple[str, ...]:
    if path is None:
        return ()
    lines = (line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines())
    return tuple(line for line in lines if line and not line.startswith("#"))


def build_rules(options: RulesOptions, context: PluginContext | None = None) -> Guard:
    """Build ``rules``; raises ValueError, with one sentence, where a rule is not valid."""
    from vllm_instant_plugins.guard.rules import Rules, RuleSet

    try:
        words = options.words + _lines(options.words_file)
        expressions = options.patterns + _lines(options.patterns_file)
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"a file with rules cannot be read: {error}") from None
    rules = RuleSet(
        words,
        expressions,
        whole_words=options.whole_words,
        homoglyphs=options.homoglyphs,
        max_match_characters=options.max_match_characters,
    )
    return Rules(rules, Action(options.action), options.replacement)


def validate(deployment: Deployment) -> Iterator[str]:
    """Rules that cannot be compiled."""
    choice = deployment.slots["guard"]
    if choice.plugin == "rules":
        try:
            build_rules(RulesOptions.model_validate(choice.options))
        except ValueError as error:
            yield f"[guard] {error}"


PLUGINS = (
    Plugin(
        slot="guard",
        name="rules",
        summary="stops or replaces words, phrases and regular expressions, however they are written",
        options=RulesOptions,
        build=build_rules,
    ),
)
