"""The demo with more rounds and intervals: stock vLLM and ours on the demo pair, one request at a time.

.venv/bin/python benchmarks/demo_pair.py [--rounds 8]
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from results import write
from rich.console import Console

from vllm_instant.tools.demo import assets, session
from vllm_instant.tools.measure.servers import Server, running
from vllm_instant.tools.measure.statistics import median_interval, ratio_interval


def main() -> None:
    """Measure, print and write ``benchmarks/results/demo_pair.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results/demo_pair.json")
    options = parser.parse_args()
    pair = assets.prepare()
    with tempfile.TemporaryDirectory() as logs:
        stock = Server(pair.target, session.shared_arguments(), log=Path(logs) / "stock.log")
        ours = Server(pair.target, session.our_arguments(pair), log=Path(logs) / "instant.log")
        with running(stock, ours):
            results = session.converse(Console(), stock, ours, options.rounds)
    measured = []
    for result in results:
        theirs = [answer.tokens_per_second for answer in result.stock]
        mine = [answer.tokens_per_second for answer in result.ours]
        ratio = ratio_interval(mine, theirs)
        measured.append(
            {
                "prompt": result.task.title,
                "temperature": result.task.temperature,
                "stock_tokens_per_second": vars(median_interval(theirs)),
                "ours_tokens_per_second": vars(median_interval(mine)),
                "ratio": vars(ratio),
                "stock_ttft_seconds": vars(median_interval([answer.ttft for answer in result.stock])),
                "ours_ttft_seconds": vars(median_interval([answer.ttft for answer in result.ours])),
                "accepted_share": result.accepted / result.proposed,
            }
        )
        print(f"{result.task.title}: {ratio:.2f} times stock, {result.accepted / result.proposed:.0%} accepted")
    write(options.output, measured)


if __name__ == "__main__":
    main()
