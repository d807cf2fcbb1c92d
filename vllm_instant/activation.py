"""Make this process serve a deployment."""

from __future__ import annotations

import logging

from vllm_instant import carrier
from vllm_instant.problems import DeploymentError, Problem
from vllm_instant.seams import (
    attention,
    catalogue,
    cpu_sampling,
    cpu_seeds,
    default_drafter,
    draft_reports,
    draft_sharing,
    draft_skipping,
    drafter,
    engine_core,
    expert_reports,
    experts,
    feed_forward,
    kernel_scan,
    plain_sampling,
    rejection_sampler,
    request_options,
    rotation,
    streaming,
    undrafted_sampling,
    worker_messages,
)
from vllm_instant.settings import Deployment

logger = logging.getLogger("vllm.instant")


def serve(deployment: Deployment, speculates: bool | None = None) -> None:
    """Check the seams that a deployment needs, publish it to later processes and activate it in this one.

    Args:
        deployment: what to serve.
        speculates: whether the server has a drafter; by default, what the deployment says.

    Raises:
        DeploymentError: when a seam that a chosen plugin needs does not fit the installed vLLM.

    """
    problems = []
    for report in catalogue.check_installed(deployment, speculates):
        if report.why_not is None:
            continue
        if report.needed_by and not report.seam.optional:
            message = (
                f"does not fit vLLM {report.version} ({report.why_not}); needed by {', '.join(report.needed_by)}. "
                "Install a vLLM of the supported range, or choose other plugins (see vllm-instant doctor)"
            )
            problems.append(Problem(f"seam {report.seam.name}", "", message))
        else:
            logger.warning("Seam %s does not fit vLLM %s: %s", report.seam.name, report.version, report.why_not)
    if problems:
        raise DeploymentError(problems)
    if not catalogue.in_supported_range():
        logger.warning(
            "vLLM %s is outside of the range that vllm-instant was tested with (%s); all needed seams fit, going on",
            catalogue.installed_version(),
            catalogue.SUPPORTED,
        )
    for slot in deployment.slots:
        plugin = deployment.offer(slot).plugin
        if plugin.lossy:
            logger.warning("Plugin %s in slot %s is lossy: answers may differ from the model's own", plugin.name, slot)
    carrier.publish(deployment)
    activate()


def activate() -> None:
    """Install the seams of a published deployment; each waits for the module that it changes.

    No seam may load plugins here: not every process that vLLM starts needs them, and Numba with them.
    """
    cpu_sampling.install()
    drafter.install()
    rejection_sampler.install()
    if streaming.is_served(carrier.current()):
        streaming.install()
    # A vLLM that they do not fit is served without them, unless a chosen plugin needs one.
    for seam in (
        default_drafter,
        draft_skipping,
        draft_sharing,  # around what skipping made of the same method
        draft_reports,
        plain_sampling,
        kernel_scan,
        cpu_seeds,  # around what the sampling of a step has become
        undrafted_sampling,
        attention,
        feed_forward,
        rotation,
        experts,
        expert_reports,
        request_options,
        engine_core,
        worker_messages,  # around the engine core's own way of leaving out the question for drafts
    ):
        if catalogue.fits_installed(seam.SEAM):
            seam.install()
