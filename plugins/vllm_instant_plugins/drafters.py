"""Drafters that vLLM itself implements: ``native``, ``model`` and ``ngram``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

from pydantic import Field

from vllm_instant import Deployment, Plugin, PluginOptions
from vllm_instant_plugins import draft_folder


class ModelOptions(PluginOptions):
    """Options of ``model``."""

    model: str = Field(description="Draft model: a folder or a Hugging Face name; same tokenizer as the target.")
    method: Literal["draft_model", "eagle", "eagle3", "mtp", "medusa", "dflash"] = Field(
        "draft_model", description="Method by which vLLM runs the model."
    )
    num_speculative_tokens: int = Field(
        4, ge=1, le=128, description="Maximum number of draft tokens per request and step."
    )
    draft_sample_method: Literal["greedy", "probabilistic"] | None = Field(
        None, description="How draft tokens are chosen at temperature > 0; vLLM's default if not set."
    )


class NgramOptions(PluginOptions):
    """Options of ``ngram``."""

    num_speculative_tokens: int = Field(
        4, ge=1, le=128, description="Maximum number of draft tokens per request and step."
    )
    prompt_lookup_min: int = Field(2, ge=1, description="Minimum number of tokens in a match.")
    prompt_lookup_max: int = Field(4, ge=1, description="Maximum number of tokens in a match.")


def _speculative_config(options: PluginOptions, **fixed: Any) -> Mapping[str, Any]:
    return {"speculative_config": {**fixed, **options.model_dump(exclude_none=True)}}


def _model(options: ModelOptions) -> Mapping[str, Any]:
    return _speculative_config(options)


def _ngram(options: NgramOptions) -> Mapping[str, Any]:
    return _speculative_config(options, method="ngram")


def validate(deployment: Deployment) -> Iterable[str]:
    """A draft model that is written as a path must exist; n-gram bounds must be in order."""
    choice = deployment.slots["drafter"]
    if choice.plugin == "model":
        yield from draft_folder.validate_option(choice.options["model"])
    if choice.plugin == "ngram" and choice.options["prompt_lookup_min"] > choice.options["prompt_lookup_max"]:
        yield (
            f"[drafter] prompt_lookup_min = {choice.options['prompt_lookup_min']} is more than "
            f"prompt_lookup_max = {choice.options['prompt_lookup_max']}"
        )


PLUGINS = (
    Plugin(
        slot="drafter",
        name="native",
        summary="vLLM's own drafter as [vllm] speculative_config says; none without it",
    ),
    Plugin(
        slot="drafter",
        name="model",
        summary="a draft model, EAGLE head or MTP layer, run by vLLM",
        options=ModelOptions,
        engine_arguments=_model,
    ),
    Plugin(
        slot="drafter",
        name="ngram",
        summary="vLLM's own lookup in the request's prompt and output",
        options=NgramOptions,
        engine_arguments=_ngram,
    ),
)
