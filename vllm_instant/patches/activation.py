"""Make this process serve a deployment."""

from __future__ import annotations

import logging

from vllm_instant.deployment import deployment_env
from vllm_instant.deployment.errors import DeploymentError, Problem
from vllm_instant.deployment.resolved import installed_plugin
from vllm_instant.interfaces.deployment import Deployment
from vllm_instant.patches import (
    attention,
    default_drafter,
    draft_model_skip,
    drafter,
    engine_core,
    feed_forward,
    fused_rope,
    hybrid_drafting,
    min_p_logit_bias,
    moe,
    moe_reports,
    registry,
    rejection_sampler,
    request_validation,
    shared_noise,
    skip_rejection_sampler,
    streaming,
    worker_reports,
)
from vllm_instant.patches.cpu import generator_offset, numba_scan, sampling, single_rpc

logger = logging.getLogger("vllm.instant")


def serve(deployment: Deployment, speculates: bool | None = None) -> None:
    """Check the patches that a deployment needs, publish it to later processes and activate it in this one.

    Args:
        deployment: what to serve.
        speculates: whether the server has a drafter; by default, what the deployment says.

    Raises:
        DeploymentError: when a patch that a chosen plugin needs does not fit the installed vLLM.

    """
    problems = []
    for report in registry.check_installed(deployment, speculates):
        if report.unsupported_reason is None:
            continue
        if report.needed_by and not report.patch.optional:
            message = (
                f"does not fit vLLM {report.version} ({report.unsupported_reason}); needed by "
                f"{', '.join(report.needed_by)}. Install a vLLM of the supported range, or choose other plugins "
                "(see vllm-instant doctor)"
            )
            problems.append(Problem(f"patch {report.patch.name}", "", message))
        else:
            logger.warning(
                "Patch %s does not fit vLLM %s: %s", report.patch.name, report.version, report.unsupported_reason
            )
    if problems:
        raise DeploymentError(problems)
    if not registry.in_supported_range():
        logger.warning(
            "vLLM %s is outside of the range that vllm-instant was tested with (%s); all needed patches fit, going on",
            registry.installed_version(),
            registry.SUPPORTED,
        )
    for slot in deployment.slots:
        plugin = installed_plugin(deployment, slot).plugin
        if plugin.lossy:
            logger.warning("Plugin %s in slot %s is lossy: answers may differ from the model's own", plugin.name, slot)
    deployment_env.set_deployment(deployment)
    activate()


def activate() -> None:
    """Install the patches of a published deployment; each waits for the module that it changes.

    No patch may load plugins here: not every process that vLLM starts needs them, and Numba with them.
    """
    sampling.install()
    drafter.install()
    rejection_sampler.install()
    if streaming.is_served(deployment_env.get_deployment()):
        streaming.install()
    # A vLLM that they do not fit is served without them, unless a chosen plugin needs one.
    for patch in (
        default_drafter,
        draft_model_skip,
        hybrid_drafting,  # around what skipping made of the same method
        worker_reports,
        skip_rejection_sampler,
        shared_noise,
        numba_scan,
        generator_offset,  # around what the sampling of a step has become
        min_p_logit_bias,
        attention,
        feed_forward,
        fused_rope,
        moe,
        moe_reports,
        request_validation,
        engine_core,
        single_rpc,  # around the engine core's own way of leaving out the question for drafts
    ):
        if registry.fits_installed(patch.PATCH):
            patch.install()
