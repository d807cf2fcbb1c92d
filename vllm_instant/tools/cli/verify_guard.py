"""``vllm-instant verify --guard FILE``: what a guard lets through, what it costs, and what it stops by mistake."""

from __future__ import annotations

import asyncio
import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

import typer

from vllm_instant.deployment.settings import resolve
from vllm_instant.interfaces.deployment import Deployment
from vllm_instant.tools.cli.common import fail, print_columns, problems_reported, require_vllm, working
from vllm_instant.tools.demo.assets import ASSETS, BASE_IN_ASSETS

COST_ANSWERS = 60


def verify_guard(
    file: Path, tokenizer: str | None, violations: Path | None, count: int, clean: int, output: Path | None
) -> None:
    """Check the guard of a deployment file, print the report, and exit with 1 where something leaked or was missed."""
    require_vllm("verify --guard")
    from vllm_instant.tools.measure.guard_check import GuardCheck, build_service

    with problems_reported():
        deployment = resolve(file)
    logging.getLogger("vllm.instant.guard").setLevel(logging.ERROR)
    planted = _violations(deployment, violations)
    try:
        service = build_service(deployment)
    except ValueError as error:
        fail(str(error))
    folder = Path(tokenizer) if tokenizer else ASSETS / BASE_IN_ASSETS
    folded = [text.casefold() for text in planted]
    check = GuardCheck(service, folder, planted, lambda text: not any(each in text.casefold() for each in folded))

    async def run(say: Any) -> tuple[Any, Any, Any]:
        leaks = await check.leaks(count, lambda done: say(f"{done} of {count} planted violations"))
        found = await check.false_stops(clean, lambda done: say(f"{done} of {clean} clean passages"))
        say("Cost")
        return leaks, found, await check.cost(COST_ANSWERS)

    with working("Checking …") as status:
        leaks, found, cost = asyncio.run(run(status.update))
    low, high = found.interval()
    options = service.options
    print_columns(
        ("check", "found", ""),
        [
            ("planted violations", f"{leaks.count}", ", ".join(f"{n} {path}" for path, n in leaks.by_path.items())),
            ("stopped or replaced", f"{leaks.stopped}", "the others were disconnected before"),
            ("missed", f"{leaks.missed}", "complete violations that reached the client"),
            (
                "leaked beyond the window",
                f"{leaks.leaked}",
                f'at most {leaks.max_leak} tokens; late = "{options.late}", window {check.window} tokens',
            ),
            ("false stops", f"{found.stopped} of {found.count}", f"rate {low:.6f} to {high:.6f} (95 %)"),
            (
                "time per token",
                f"{1e6 * cost.seconds_per_token:+.0f} µs",
                f"{1e6 * cost.baseline_seconds_per_token:.0f} µs without a guard, in the API server",
            ),
            ("first text", f"{cost.later_steps:+.2f} steps", f"99 % of parts within {cost.max_gap_steps} steps"),
        ],
    )
    if output is not None:
        report = {
            "leaks": {**asdict(leaks), "by_path": dict(leaks.by_path)},
            "window": check.window,
            "false_stops": {**asdict(found), "interval": [low, high]},
            "cost": asdict(cost),
        }
        output.write_text(json.dumps(report, indent=2) + "\n")
    if leaks.leaked or leaks.missed:
        raise typer.Exit(1)


def _violations(deployment: Deployment, file: Path | None) -> list[str]:
    """The texts to plant: the lines of a file, or the words of ``rules``."""
    if file is not None:
        try:
            found = [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            fail(f"--violations {file} cannot be read: {error}")
    else:
        found = list(deployment.slots["guard"].options.get("words", ()))
    if not found:
        fail("give --violations FILE with texts that this guard must stop, one per line")
    return found
