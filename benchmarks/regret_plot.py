"""The picture of the regret results: tokens per second and p99 time between tokens over the load, one line per arm.

.venv/bin/python benchmarks/regret_plot.py [RESULT.json]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

OURS, OFF = "ours", "off"


def plot(result: Path) -> Path:
    """Draw the runs under the usual conditions as ``docs/regret.png``; returns the picture's path."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    cells = [cell for run in json.loads(result.read_text())["runs"] if not run["name"] for cell in run["measured"]]
    drafters = list(dict.fromkeys(cell["drafter"] for cell in cells))
    figure, axes = pyplot.subplots(2, len(drafters), figsize=(4.2 * len(drafters), 7), squeeze=False)
    for column, drafter in enumerate(drafters):
        of_drafter = [cell for cell in cells if cell["drafter"] == drafter]
        of_drafter.sort(key=lambda cell: cell["users"])
        seen = dict.fromkeys(arm for cell in of_drafter for arm in cell["arms"])
        arms = [arm for arm in seen if arm == OURS or not arm.startswith((OURS, "off again"))]
        arms.sort(key=lambda arm: (arm == OURS, arm != OFF, arm))
        for arm in arms:
            style = {"color": "black", "linewidth": 2.2, "marker": "o"} if arm == OURS else {"marker": "."}
            if arm == OFF:
                style |= {"linestyle": "--", "color": "grey"}
            points = [cell for cell in of_drafter if arm in cell["arms"]]
            users = [cell["users"] for cell in points]
            speeds = [cell["arms"][arm]["tokens_per_second"] for cell in points]
            medians = [speed["median"] for speed in speeds]
            spread = [
                [speed["median"] - speed["low"] for speed in speeds],
                [speed["high"] - speed["median"] for speed in speeds],
            ]
            axes[0][column].errorbar(users, medians, yerr=spread, label=arm, **style)
            axes[1][column].plot(users, [cell["arms"][arm]["p99_itl_ms"] for cell in points], label=arm, **style)
        for row, title in ((0, "output tokens / s"), (1, "p99 time between tokens, ms")):
            axis = axes[row][column]
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
            axis.set_xticks([cell["users"] for cell in of_drafter], [str(cell["users"]) for cell in of_drafter])
            axis.set_xlabel("users")
            axis.set_title(f"{drafter}: {title}", fontsize=10)
            axis.grid(alpha=0.3, which="both")
    axes[0][0].legend(fontsize=8)
    figure.tight_layout()
    picture = Path(__file__).resolve().parent.parent / "docs/regret.png"
    figure.savefig(picture, dpi=110)
    print(f"wrote {picture}")
    return picture


if __name__ == "__main__":
    plot(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "results/regret.json")
