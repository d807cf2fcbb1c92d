"""Tables of the capacity search (simulated queues, and servers), and of spikes that the machine causes."""

from __future__ import annotations

from collections.abc import Sequence

from result_tables import Run, Show, cells_of, table


def simulated(runs: Sequence[Run]) -> str:
    """How often the intervals contain the truth, and what is said about two servers."""
    (run,) = [run for run in runs if run["name"] == "simulated queues"]
    rows = [
        [
            f"{cell['true_ratio']:.1f}×",
            str(cell["runs"]),
            f"{cell['intervals_with_the_truth']:.0%}",
            f"{cell['ratio_intervals_with_the_truth']:.0%}",
            f"{cell['probes']:.0f}",
            ", ".join(f"{count} {verdict}" for verdict, count in cell["verdicts"].items()),
        ]
        for cell in run["measured"]["cells"]
    ]
    head = ["true ratio", "searches", "capacity in its interval", "ratio in its interval", "probes", "verdicts"]
    return table(head, rows)


def servers(runs: Sequence[Run]) -> str:
    """Capacities of servers, with the check by a sweep, and their comparisons."""
    rows = []
    for cell in cells_of(runs, "servers"):
        for server in cell["servers"]:
            rate, users = server["rate"], server["users"]
            found = f"{rate['mean']:.2f} [{rate['low']:.2f}, {rate['high']:.2f}]" if server["bounded"] else "not found"
            crossed = server.get("crossing")
            sweep = f"; crossed at {crossed:.2f}" if crossed is not None else ""
            rows.append(
                [
                    f"{cell['scenario']}, {cell['way']}",
                    server["server"],
                    f"{found}{sweep}",
                    f"{users['mean']:.1f}",
                    server["deciding_goal"],
                    str(len(server["probes"])),
                    f"{sum(cell['minutes']):.1f}",
                    "; ".join(one["sentence"] for one in cell["comparisons"] if one["ours"] == server["server"]),
                ]
            )
    head = ["scenario", "server", "requests per second", "in progress", "missed first", "probes", "minutes", ""]
    return table(head, rows)


def machine(runs: Sequence[Run]) -> str:
    """Simulated disturbances of the machine that were found and named."""
    [found] = cells_of(runs, "the machine, simulated")
    keys = ("cause", "events", "found_and_named", "spikes_named_so", "rightly")
    rows = [[str(row[key]) for key in keys] for row in found["by_cause"]]
    head = ["cause", "disturbances", "found and rightly named", "spikes named so", "rightly"]
    undisturbed = f"{found['undisturbed_with_spikes']} of {found['undisturbed']}"
    return f"{table(head, rows)}\n\nUndisturbed simulated runs with a spike: {undisturbed}."


TABLES: dict[str, tuple[str, Show]] = {
    "capacity_simulated": ("capacity", simulated),
    "spikes_machine": ("spikes", machine),
    "capacity_servers": ("capacity_servers", servers),
}
