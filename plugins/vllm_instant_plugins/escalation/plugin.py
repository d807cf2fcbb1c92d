"""The escalation plugins: their options and how they are built."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import Field

from vllm_instant import Deployment, Plugin, PluginContext
from vllm_instant.interfaces.escalation import Depth, Escalation, EscalationOptions


class RulesOptions(EscalationOptions):
    """Options of ``rules``."""

    rules: tuple[dict[str, Any], ...] = Field(
        description="The rules, of which the first that applies decides: each a table with depth, name and conditions "
        "(pattern, min_characters, max_characters, headers, users, tools)."
    )
    otherwise: Depth = Field(Depth.FAST, description="The end of requests to which no rule applies.")


def build_rules(options: RulesOptions, context: PluginContext | None = None) -> Escalation:
    """Build ``rules``; raises ValueError, with one sentence, where a rule is not valid."""
    from vllm_instant_plugins.escalation.rules import Rules, read_rules

    return Rules(read_rules(options.rules), options.otherwise)


class LabelOptions(EscalationOptions):
    """Options of ``label``."""

    question: str = Field(
        "Does a good answer to this need careful reasoning in several steps? Reply with yes or no only.",
        description="The question about the prompt that this server's model answers with one token, yes or no.",
    )
    yes: str = Field("yes", min_length=1, description="The answer for which a request goes deep.")
    no: str = Field("no", min_length=1, description="The other answer.")
    threshold: float = Field(
        0.5, ge=0, le=1, description="Probability of the first answer, among both, from which a request goes deep."
    )
    max_wait_seconds: float = Field(
        5.0, gt=0, le=600, description="Seconds without the model's answer after which a request is answered fast."
    )


def build_label(options: LabelOptions, context: PluginContext | None = None) -> Escalation:
    """Build ``label``."""
    from vllm_instant_plugins.escalation.label import Label

    return Label(options.question, options.yes, options.no, options.threshold, options.max_wait_seconds)


class LearnedOptions(EscalationOptions):
    """Options of ``learned``."""

    rule_file: str = Field(description="The file that vllm-instant escalation learn wrote.")
    threshold: float | None = Field(
        None, ge=0, le=1, description="Probability from which a request goes deep; by default the learned one."
    )


def build_learned(options: LearnedOptions, context: PluginContext | None = None) -> Escalation:
    """Build ``learned``; raises ValueError, with one sentence, where its file is no learned rule."""
    from vllm_instant.escalation.learned_rule import read_rule
    from vllm_instant_plugins.escalation.learned import Learned

    rule = read_rule(Path(options.rule_file))
    return Learned(rule, rule.threshold if options.threshold is None else options.threshold)


def validate(deployment: Deployment) -> Iterator[str]:
    """Rules that are not valid, ends that do not differ, and answers that no guard would judge."""
    choice = deployment.slots["escalation"]
    if choice.plugin == "off":
        return
    options = choice.options
    try:
        if choice.plugin == "rules":
            build_rules(RulesOptions.model_validate(options))
        elif choice.plugin == "learned":
            build_learned(LearnedOptions.model_validate(options))
    except ValueError as error:
        yield f"[escalation] {error}"
    if options.get("deep_url") is None and options.get("deep_settings") == options.get("fast_settings"):
        yield "[escalation] both ends are the same: set deep_url, or deep_settings that differ from fast_settings"
    has_guard = deployment.slots["guard"].plugin != "off"
    if options.get("escalate_stopped") and not has_guard:
        yield "[escalation] escalate_stopped is about answers that a [guard] stops: choose one, or remove it"
    if has_guard and options.get("deep_url") is not None and not options.get("deep_is_guarded"):
        yield (
            "[escalation] answers of deep_url do not pass this server's [guard]: give the deep server its own and set "
            "deep_is_guarded = true, or remove one of them"
        )


PLUGINS = (
    Plugin(
        slot="escalation",
        name="rules",
        summary="requests go deep by patterns, length, headers, users or tools",
        lossy=True,
        options=RulesOptions,
        build=build_rules,
    ),
    Plugin(
        slot="escalation",
        name="label",
        summary="the model reads the prompt and answers one question about it with one token",
        lossy=True,
        options=LabelOptions,
        build=build_label,
    ),
    Plugin(
        slot="escalation",
        name="learned",
        summary="a rule learned from answers of both ends, with a calibrated probability",
        lossy=True,
        options=LearnedOptions,
        build=build_learned,
    ),
)
