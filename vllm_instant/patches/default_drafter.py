"""A server that nobody gave a drafter gets the default one, where that costs nothing and breaks nothing.

That is decided when the model is known, because it depends on the model: only text generation speculates. On devices
where vLLM overlaps scheduling and execution a drafter of ours would end that overlap, which plain vLLM has: there it
must be asked for by name.
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

from vllm_instant.deployment import deployment_env
from vllm_instant.deployment.resolved import drafter_arguments, is_default_drafter
from vllm_instant.interfaces.deployment import Deployment
from vllm_instant.patches.compat import HasAttribute, HasSignature, References, VllmPatch
from vllm_instant.patches.import_hooks import when_imported

MODULE = "vllm.engine.arg_utils"


def may_be_used(arguments: Any, deployment: Deployment) -> bool:
    """Whether the default drafter may serve these parsed options (or EngineArgs): nothing stands against it so far."""
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


def _wrap(module: ModuleType) -> None:
    original = module.EngineArgs.create_speculative_config

    @functools.wraps(original)
    def create_speculative_config(self: Any, target_model_config: Any, *args: Any, **kwargs: Any) -> Any:
        from vllm_instant.patches.scheduler import QUALIFIED_NAME

        deployment = deployment_env.get_deployment()
        if (
            deployment is not None
            and self.scheduler_cls == QUALIFIED_NAME
            and may_be_used(self, deployment)
            and target_model_config.runner_type == "generate"
            and not target_model_config.is_encoder_decoder
        ):
            self.speculative_config = drafter_arguments(deployment)["speculative_config"]
        return original(self, target_model_config, *args, **kwargs)

    module.EngineArgs.create_speculative_config = create_speculative_config


def install() -> None:
    """Wrap the engine arguments when they are loaded."""
    when_imported(MODULE, _wrap)


_ARGUMENTS = "engine/arg_utils.py"

PATCH = VllmPatch(
    name="default drafter",
    purpose="a drafter for servers that name none",
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
)
