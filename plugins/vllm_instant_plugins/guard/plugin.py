"""The guard plugins: their options and how they are built."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

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
    min_beginning: int = Field(
        1,
        ge=1,
        le=64,
        description="Number of characters from which the beginning of a possible match is withheld. With more than 1 "
        "shorter beginnings of violations are released, and less clean text is delayed.",
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
    return Rules(rules, Action(options.action), options.replacement, options.min_beginning)


class ClassifierOptions(GuardOptions):
    """Options of ``classifier``."""

    model: str = Field(description="A Hugging Face model for sequence classification: a name or a folder.")
    device: str = Field("cpu", description="Device of the model, as torch names it.")
    unsafe_labels: tuple[str, ...] = Field(
        (), description="Names of the labels that count as unsafe; by default the model's last one."
    )
    threshold: float = Field(0.5, gt=0, le=1, description="Probability from which a text is stopped.")
    escalate_from: float | None = Field(
        None, ge=0, le=1, description="Probability from which the next tier decides; by default none does."
    )
    context_characters: int = Field(
        400, ge=16, le=20_000, description="Number of characters, up to the newest, that are scored at once."
    )
    max_tokens: int = Field(256, ge=8, le=8192, description="Maximum number of the classifier's tokens per text.")
    restart_seconds: float = Field(
        2.0, gt=0, description="Seconds without an answer after which the classifier's process is started again."
    )


def build_classifier(options: ClassifierOptions, context: PluginContext | None = None) -> Guard:
    """Build ``classifier``; raises ValueError, with one sentence, where its model cannot be loaded."""
    from vllm_instant_plugins.guard.classifier import ClassifierGuard
    from vllm_instant_plugins.guard.classifier_process import ClassifierProcess

    arguments = {
        "model": options.model,
        "device": options.device,
        "unsafe": list(options.unsafe_labels),
        "max_tokens": options.max_tokens,
    }
    process = ClassifierProcess(arguments, options.restart_seconds)
    process.wait_until_ready()
    return ClassifierGuard(process, options.threshold, options.escalate_from, options.context_characters)


class ModelOptions(GuardOptions):
    """Options of ``model``."""

    url: str = Field(description="Address of an OpenAI-compatible server with a guard model, not this server.")
    model: str = Field(description="Name of the guard model at that server.")
    unsafe_pattern: str = Field(
        r"^\s*unsafe", description="Regular expression that finds the model's answer to an unsafe text."
    )
    api_key: str | None = Field(None, description="API key of that server.")
    timeout_seconds: float = Field(5.0, gt=0, description="Seconds after which a request is sent again.")
    max_requests: int = Field(8, ge=1, le=256, description="Maximum number of requests at once.")
    context_characters: int = Field(
        4000, ge=16, le=200_000, description="Number of characters, up to the newest, that are sent."
    )


def build_model(options: ModelOptions, context: PluginContext | None = None) -> Guard:
    """Build ``model``; raises ValueError, with one sentence, where its pattern is not valid."""
    from vllm_instant_plugins.guard.classifier import ClassifierGuard
    from vllm_instant_plugins.guard.model_client import ModelClient

    client = ModelClient(
        options.url,
        options.model,
        options.unsafe_pattern,
        options.api_key,
        options.timeout_seconds,
        options.max_requests,
    )
    return ClassifierGuard(client, 0.5, None, options.context_characters)


class TiersOptions(GuardOptions):
    """Options of ``tiers``."""

    tiers: tuple[dict[str, Any], ...] = Field(
        description="The tiers, first to last: each a table with plugin, the plugin's own options, and optionally name "
        'and asked = "always" or "escalated" (only from the first escalation of an earlier tier on).'
    )


_TIERS: dict[str, tuple[type[GuardOptions], Callable[[Any, PluginContext | None], Guard]]] = {
    "rules": (RulesOptions, build_rules),
    "classifier": (ClassifierOptions, build_classifier),
    "model": (ModelOptions, build_model),
}


def tier_options(table: Mapping[str, Any]) -> tuple[str, str, bool, GuardOptions]:
    """Return the plugin, the name, whether it is always asked, and the options of one tier.

    Raises:
        ValueError: With one sentence, if the table is not valid.

    """
    given = dict(table)
    plugin = given.pop("plugin", None)
    if plugin not in _TIERS:
        raise ValueError(f"a tier's plugin must be one of {', '.join(_TIERS)}, not {plugin!r}")
    name, asked = str(given.pop("name", plugin)), given.pop("asked", "always")
    if asked not in ("always", "escalated"):
        raise ValueError(f'tier {name}: asked must be "always" or "escalated", not {asked!r}')
    if common := sorted(given.keys() & GuardOptions.model_fields.keys()):
        raise ValueError(f"tier {name}: {common[0]} belongs into [guard], it holds for all tiers")
    try:
        return plugin, name, asked == "always", _TIERS[plugin][0].model_validate(given)
    except ValidationError as error:
        detail = error.errors()[0]
        raise ValueError(f"tier {name}: {'.'.join(map(str, detail['loc']))}: {detail['msg']}") from None


def build_tiers(options: TiersOptions, context: PluginContext | None = None) -> Guard:
    """Build ``tiers``; raises ValueError, with one sentence, where a tier cannot be built."""
    from vllm_instant_plugins.guard.tiers import Tier, Tiers

    tiers = []
    for plugin, name, is_asked_always, own in map(tier_options, options.tiers):
        tiers.append(Tier(name, _TIERS[plugin][1](own, context), is_asked_always))
    if not tiers or not tiers[0].is_asked_always:
        raise ValueError("the first tier must always be asked")
    return Tiers(tiers)


def validate(deployment: Deployment) -> Iterator[str]:
    """Rules that cannot be compiled, and tiers that are not valid."""
    choice = deployment.slots["guard"]
    tables = {"rules": [{"plugin": "rules", **_own(choice.options)}], "tiers": choice.options.get("tiers", ())}
    for table in tables.get(choice.plugin, ()):
        try:
            plugin, _, _, options = tier_options(table)
            if plugin == "rules":
                build_rules(RulesOptions.model_validate(options.model_dump()))
        except ValueError as error:
            yield f"[guard] {error}"


def _own(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a plugin without those of every guard."""
    return {key: value for key, value in options.items() if key not in GuardOptions.model_fields}


PLUGINS = (
    Plugin(
        slot="guard",
        name="rules",
        summary="stops or replaces words, phrases and regular expressions, however they are written",
        options=RulesOptions,
        build=build_rules,
    ),
    Plugin(
        slot="guard",
        name="classifier",
        summary="stops what a sequence-classification model finds unsafe, in a process of its own",
        options=ClassifierOptions,
        build=build_classifier,
    ),
    Plugin(
        slot="guard",
        name="model",
        summary="asks a guard model at an OpenAI-compatible URL; best as a tier behind a cheaper one",
        options=ModelOptions,
        build=build_model,
    ),
    Plugin(
        slot="guard",
        name="tiers",
        summary="several guards over one text, some asked only where an earlier one is uncertain",
        options=TiersOptions,
        build=build_tiers,
    ),
)
