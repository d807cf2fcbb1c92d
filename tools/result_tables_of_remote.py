"""Tables of drafts that come over a network."""

from __future__ import annotations

from collections.abc import Sequence

from result_tables import Run, Show, cells_of, interval, table


def speed(runs: Sequence[Run]) -> str:
    """Speed by round trip, relative to no speculation and to the draft model on the same cores."""
    cells = [cell for cell in cells_of(runs, "speed") if cell["part"] == "speed"]
    rows = [
        [
            cell["drafts"],
            cell["link"],
            str(cell["users"]),
            *(f"{cell['tokens_per_second'][arm]['median']:.0f}" for arm in ("off", "local draft model", "remote")),
            interval(cell["remote_to_off"]),
            interval(cell["remote_to_local"]),
            f"{cell['bytes_per_token']:.0f}",
            f"{cell['cores_of_replay']:.0%}" if "cores_of_replay" in cell else "",
        ]
        for cell in cells
    ]
    head = ["drafts", "delay each way", "users", "no speculation, tokens/s", "draft model here, tokens/s"]
    head += ["remote, tokens/s", "remote / no speculation", "remote / draft model here", "bytes per token"]
    head += ["core taken by the stand-in for the network and the draft server"]
    made = table(head, rows)
    for cell in cells_of(runs, "speed"):
        if cell["part"] == "answers":
            made += f"\n\nAnswers equal to those of vLLM alone: {cell['equal']} of {cell['asked']}."
    return made


def engine(runs: Sequence[Run]) -> str:
    """What the drafter costs the engine."""
    rows = [
        [
            str(cell["users"]),
            cell["link"],
            f"{cell['in_step_us_per_request']['median']:.0f}",
            f"{cell['in_step_us_per_request']['p99']:.0f}",
            f"{cell['cpu_us_per_request']:.0f}",
            f"{cell['plain_exchange_us_per_request']:.0f}" if "plain_exchange_us_per_request" in cell else "",
            f"{cell['drafted_per_step']:.1f}",
            f"{cell['bytes_per_token']:.1f}",
        ]
        for cell in cells_of(runs, "engine")
    ]
    head = ["requests", "delay each way", "µs per request in a step, median", "99th percentile"]
    head += ["CPU µs per request and step, with the thread", "the same of one message each way over a plain socket"]
    head += ["draft tokens per request and step", "bytes per token"]
    return table(head, rows)


TABLES: dict[str, tuple[str, Show]] = {"remote_speed": ("remote", speed), "remote_engine": ("remote", engine)}
