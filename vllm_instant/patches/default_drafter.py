"""Give a server without a drafter the default one, where this costs nothing and breaks nothing.

The decision is made when the model is known, because only text generation speculates. On devices where vLLM overlaps
scheduling and execution a drafter plugin would end that overlap: there it must be chosen by name.
"""

from __future__ import annotations

from typing import Any

from vllm_instant.deployment import deployment_env
from vllm_instant.deployment.resolved import drafter_arguments, is_default_drafter
from vllm_instant.interfaces.deployment import Deployment
from vllm_instant.patches.compat import HasAttribute, HasSignature, References, VllmPatch
from vllm_instant.patches.names import ENGINE_ARGUMENTS, QUALIFIED_NAME


def may_be_used(arguments: Any, deployment: Deployment) -> bool:
    """Whether nothing in these parsed options (or EngineArgs) rules out the default drafter."""
    from vllm.platforms import current_platform

    return (
        is_default_drafter(deployment)
        and deployment.slots["speculation"].plugin != "off"
        and not chooses_drafter(arguments)
        and not getattr(arguments, "logits_processors", None)
        and current_platform.is_cpu()
    )


def chooses_drafter(arguments: Any) -> bool:
    """Whether parsed options (or EngineArgs) name a speculative method."""
    options = ("speculative_config", "spec_method", "spec_model", "spec_tokens")
    return any(getattr(arguments, option, None) is not None for option in options)


def _create_speculative_config(create: Any, arguments: Any, target_model_config: Any, *args: Any, **kwargs: Any) -> Any:
    deployment = deployment_env.get_deployment()
    if (
        deployment is not None
        and arguments.scheduler_cls == QUALIFIED_NAME
        and may_be_used(arguments, deployment)
        and target_model_config.runner_type == "generate"
        and not target_model_config.is_encoder_decoder
    ):
        arguments.speculative_config = drafter_arguments(deployment)["speculative_config"]
    return create(target_model_config, *args, **kwargs)


_ARGUMENTS = "engine/arg_utils.py"

PATCH = VllmPatch(
    name="default_drafter",
    purpose="a default drafter for servers that name none",
    requirements=(
        HasSignature(_ARGUMENTS, "EngineArgs.create_speculative_config", ("self", "target_model_config")),
        References(_ARGUMENTS, "EngineArgs.create_engine_config", ("create_speculative_config", "create_model_config")),
        HasAttribute(_ARGUMENTS, "EngineArgs.logits_processors"),
        HasAttribute(_ARGUMENTS, "EngineArgs.scheduler_cls"),
        References("config/model.py", "ModelConfig.__post_init__", ("runner_type",)),
        HasAttribute("config/model.py", "ModelConfig.is_encoder_decoder"),
    ),
    slots=("drafter",),
    optional=True,
    wraps={f"{ENGINE_ARGUMENTS}:EngineArgs.create_speculative_config": _create_speculative_config},
)
