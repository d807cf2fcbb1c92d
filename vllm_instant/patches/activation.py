"""Make this process serve a deployment."""

from __future__ import annotations

import logging

from vllm_instant.deployment import deployment_env
from vllm_instant.deployment.errors import DeploymentError, Problem
from vllm_instant.deployment.resolved import installed_plugin
from vllm_instant.interfaces.deployment import Deployment
from vllm_instant.patches import flags, registry
from vllm_instant.patches.compat import VllmPatch
from vllm_instant.patches.wrapped_methods import METHODS
from vllm_instant.patches.wrapping import Wrapping

logger = logging.getLogger("vllm.instant")

_wrapping = Wrapping(METHODS)


def offer_flags() -> None:
    """Add the package's options to vLLM's command line, and serve the deployments that they select; idempotent."""
    flags.on_selection(serve)
    _wrapping.activate((flags.PATCH,))


def serve(deployment: Deployment, speculates: bool | None = None) -> None:
    """Check the patches that a deployment needs, publish it to later processes and activate it in this one.

    Args:
        deployment: the deployment to serve.
        speculates: whether the server has a drafter; by default, what the deployment says.

    Raises:
        DeploymentError: a patch that a chosen plugin needs does not fit the installed vLLM.

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
            "vLLM %s is outside of the range that vllm-instant was tested with (%s); needed patches fit, continuing",
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
    """Activate the patches of the published deployment that fit this vLLM; each waits for the module that it changes.

    A vLLM that an optional patch does not fit is served without it. No patch may load plugins here, because not every
    process of vLLM needs them, and Numba with them.
    """
    fitting = registry.fitting_installed()
    _wrapping.activate(
        patch for patch in registry.PATCHES if patch.name in fitting and (patch.is_wanted is None or patch.is_wanted())
    )


def activate_for_replay(patch: VllmPatch) -> None:
    """Activate one patch without a deployment, to run its part of vLLM outside of a server."""
    _wrapping.activate((patch,))
