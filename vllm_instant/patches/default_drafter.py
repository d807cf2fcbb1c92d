"""Give a server without a drafter the default one, where this costs nothing and breaks nothing.

The decision is made when the model is known, because only text generation speculates. On devices where vLLM overlaps
scheduling and execution a drafter plugin would end that overlap: there it must be chosen by name.
"""

from __future__ import annotations

import logging
from importlib.metadata import entry_points
from typing import Any

from vllm_instant.deployment import deployment_env
from vllm_instant.deployment.errors import DeploymentError, Problem
from vllm_instant.deployment.resolved import drafter_arguments, is_default_drafter
from vllm_instant.interfaces.deployment import Deployment
from vllm_instant.patches.compat import HasAttribute, HasSignature, References, VllmPatch
from vllm_instant.patches.names import ENGINE_ARGUMENTS, QUALIFIED_NAME

logger = logging.getLogger("vllm.instant")


def may_be_used(arguments: Any, deployment: Deployment) -> bool:
    """Whether nothing in these parsed options (or EngineArgs) rules out the default drafter."""
    from vllm.platforms import current_platform

    return (
        is_default_drafter(deployment)
        and deployment.slots["speculation"].plugin != "off"
        and not chooses_drafter(arguments)
        and unsupported_feature(arguments) is None
        and current_platform.is_cpu()
    )


def unsupported_feature(arguments: Any) -> str | None:
    """Return the feature in parsed options (or EngineArgs) that works only without a drafter plugin; None for none."""
    if getattr(arguments, "logits_processors", None):
        return "--logits-processors"
    if any(entry_points(group="vllm.logits_processors")):
        return "an installed package with logits processors"
    if getattr(arguments, "enable_lora", None):
        return "--enable-lora"
    # vLLM counts thinking_token_budget wrongly where speculation is configured, in steps without drafts as well.
    if getattr(arguments, "reasoning_parser", None) or getattr(arguments, "reasoning_config", None):
        return "--reasoning-parser or --reasoning-config"
    # vLLM refuses each of these beside speculation: at the start, or the requests that use it.
    for option in ("watermark_config", "enable_trace_replay", "enable_dbo"):
        if getattr(arguments, option, None):
            return f"--{option.replace('_', '-')}"
    # By default, None, vLLM decides itself, and schedules synchronously with a drafter.
    if getattr(arguments, "async_scheduling", None):
        return "--async-scheduling"
    return None


def unsupported_model(model_config: Any) -> str | None:
    """Return what a model has that rejected drafts could harm, or why it takes none; None for nothing.

    State of recurrent layers after rejected tokens must be restored by their number, which only some of vLLM's
    layers do on some devices. Such models are drafted for where a drafter is named.
    """
    if model_config.runner_type != "generate":
        return "no text generation"
    if model_config.is_encoder_decoder:
        return "an encoder"
    if model_config.is_diffusion:
        return "a canvas of a diffusion language model"
    if model_config.is_hybrid or model_config.is_attention_free:
        return "recurrent layers"
    return None


def chooses_drafter(arguments: Any) -> bool:
    """Whether parsed options (or EngineArgs) name a speculative method."""
    options = ("speculative_config", "spec_method", "spec_model", "spec_tokens")
    return any(getattr(arguments, option, None) is not None for option in options)


def _create_speculative_config(create: Any, arguments: Any, target_model_config: Any, *args: Any, **kwargs: Any) -> Any:
    deployment = deployment_env.get_deployment()
    feature = unsupported_feature(arguments)
    if feature is not None and deployment is not None and is_default_drafter(deployment):
        logger.info("The default drafter is left out because of %s; [drafter] plugin chooses one regardless", feature)
    if deployment is not None and arguments.scheduler_cls == QUALIFIED_NAME and may_be_used(arguments, deployment):
        reason = unsupported_model(target_model_config)
        if reason is None:
            arguments.speculative_config = drafter_arguments(deployment)["speculative_config"]
        else:
            logger.info("The default drafter is left out: the model has %s", reason)
    try:
        created = create(target_model_config, *args, **kwargs)
        if deployment is not None and getattr(created, "method", None) == "draft_model":
            extend_positions(created.draft_model_config.hf_text_config, target_model_config.max_model_len)
        return created
    except (ValueError, OSError) as error:
        if (
            deployment is None
            or is_default_drafter(deployment)
            or "speculative_config" not in drafter_arguments(deployment)
        ):
            raise
        source = deployment.origins.get("drafter.plugin", deployment.file or "deployment")
        raise DeploymentError([Problem(source, "[drafter]", _sentence_of(error))]) from error


def extend_positions(draft: Any, max_model_len: int) -> None:
    """Let a draft model read as many positions as the target: vLLM gives it all of them, whatever it was made for.

    A rotation can be computed for any position, as vLLM does for EAGLE drafts; drafts beyond the positions of the
    training are accepted less often. A table of learned positions has an end.

    Args:
        draft: Configuration of the draft model; changed in place.
        max_model_len: Maximum number of tokens of a request.

    Raises:
        ValueError: the draft model has a table of positions that is too short.

    """
    positions = getattr(draft, "max_position_embeddings", None)
    if not isinstance(positions, int) or positions >= max_model_len:
        return
    if not getattr(draft, "rope_parameters", None):
        raise ValueError(
            f"the draft model has {positions} positions, requests may have {max_model_len} tokens: "
            f"set [vllm] max_model_len = {positions} or choose another draft model"
        )
    logger.info(
        "The draft model was made for %d positions, requests may have %d tokens: later drafts may be accepted less",
        positions,
        max_model_len,
    )
    draft.max_position_embeddings = max_model_len


def _sentence_of(error: Exception) -> str:
    """What vLLM says of a drafter that it refuses, in one line."""
    details = getattr(error, "errors", None)
    text = str(details()[0]["msg"]) if callable(details) else str(error)
    return " ".join(text.removeprefix("Value error, ").split())[:500]


_ARGUMENTS = "engine/arg_utils.py"

PATCH = VllmPatch(
    name="default_drafter",
    purpose="a default drafter for servers that name none",
    requirements=(
        HasSignature(_ARGUMENTS, "EngineArgs.create_speculative_config", ("self", "target_model_config")),
        References(_ARGUMENTS, "EngineArgs.create_engine_config", ("create_speculative_config", "create_model_config")),
        HasAttribute(_ARGUMENTS, "EngineArgs.logits_processors"),
        HasAttribute(_ARGUMENTS, "EngineArgs.enable_lora"),
        HasAttribute(_ARGUMENTS, "EngineArgs.async_scheduling"),
        HasAttribute(_ARGUMENTS, "EngineArgs.scheduler_cls"),
        References("config/model.py", "ModelConfig.__post_init__", ("runner_type", "hf_text_config", "max_model_len")),
        HasAttribute("config/speculative.py", "SpeculativeConfig.draft_model_config"),
        HasAttribute("config/model.py", "ModelConfig.is_encoder_decoder"),
        HasAttribute("config/model.py", "ModelConfig.is_diffusion"),
        HasAttribute("config/model.py", "ModelConfig.is_hybrid"),
        HasAttribute("config/model.py", "ModelConfig.is_attention_free"),
    ),
    slots=("drafter",),
    optional=True,
    wraps={f"{ENGINE_ARGUMENTS}:EngineArgs.create_speculative_config": _create_speculative_config},
)
