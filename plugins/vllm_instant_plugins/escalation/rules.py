"""Requests go deep by rules over their text, form and headers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vllm_instant.interfaces.escalation import Decision, Depth, Escalation, EscalationRequest, Question
from vllm_instant_plugins.guard.expressions import compile_re2


class Rule(BaseModel):
    """One rule: it applies where all of its conditions do."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    depth: Depth = Depth.DEEP
    name: str = Field("", max_length=60)
    pattern: str | None = None
    """A regular expression that is found in the prompt."""
    min_characters: int | None = Field(None, ge=0)
    max_characters: int | None = Field(None, ge=0)
    """Of the prompt."""
    headers: dict[str, str] = Field(default_factory=dict)
    """Regular expressions for the whole values of headers, by name: a tenant, a route, an application."""
    users: tuple[str, ...] = ()
    """Values of the request's field ``user``."""
    tools: bool | None = None
    """Whether the request has tools."""


def read_rules(tables: Sequence[Mapping[str, Any]]) -> tuple[Rule, ...]:
    """Return the rules, each with a name; raises ValueError, with one sentence, where one is not valid."""
    found = []
    for number, table in enumerate(tables, start=1):
        try:
            rule = Rule.model_validate(table)
        except ValidationError as error:
            detail = error.errors()[0]
            raise ValueError(f"rule {number}: {'.'.join(map(str, detail['loc']))}: {detail['msg']}") from None
        found.append(rule if rule.name else rule.model_copy(update={"name": f"rule {number}"}))
    return tuple(found)


@dataclass(frozen=True)
class _Compiled:
    """A rule with its expressions, which take linear time (RE2)."""

    rule: Rule
    pattern: Any
    headers: Mapping[str, Any]

    def applies(self, request: EscalationRequest) -> bool:
        rule, length = self.rule, len(request.prompt)
        if rule.min_characters is not None and length < rule.min_characters:
            return False
        if rule.max_characters is not None and length > rule.max_characters:
            return False
        if rule.tools is not None and bool(request.body.get("tools")) is not rule.tools:
            return False
        if rule.users and request.body.get("user") not in rule.users:
            return False
        if any(not value.fullmatch(request.headers.get(name, "")) for name, value in self.headers.items()):
            return False
        return self.pattern is None or self.pattern.search(request.prompt) is not None


class Rules(Escalation):
    """The escalation ``rules``: the first rule that applies decides.

    Args:
        rules: The rules, with names.
        otherwise: The end of requests to which none applies.

    """

    def __init__(self, rules: Sequence[Rule], otherwise: Depth) -> None:
        self._otherwise = Decision(otherwise, "no rule applies")
        self._rules = [
            _Compiled(
                rule,
                None if rule.pattern is None else compile_re2(rule.pattern),
                {name.lower(): compile_re2(value) for name, value in rule.headers.items()},
            )
            for rule in rules
        ]

    def decide(self, request: EscalationRequest, answer: Mapping[str, Any] | None) -> Decision | Question:
        for compiled in self._rules:
            if compiled.applies(request):
                return Decision(compiled.rule.depth, f"rule: {compiled.rule.name}")
        return self._otherwise
