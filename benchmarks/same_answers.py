"""Whether the answers are those of vLLM, with any flag of ``vllm serve`` and any option of a request.

    python benchmarks/same_answers.py pairs --seconds 3600
    python benchmarks/same_answers.py single --seconds 3600

Each row of the table is a pair of servers, vLLM alone and ours, with the same flags (but vLLM's never drafts): in
``single`` one flag or one choice of our slots (``tests/support/server_flags.py``), in ``pairs`` many at once, so that
any two of them occur together. Both get the same requests: each option of a request alone, and completions in which any
two options occur together (``tests/support/request_features.py``). Ours gets them twice, the second time with eight
pinned draft tokens. vLLM gets them twice as well: what it answers otherwise the second time is compared with nothing,
and counted.
The model is the demo's draft model in float32, where rounding does not choose tokens.

Rows that the result file has already are skipped; ``--again`` measures those again whose answers differ. The exit code
is 1 where an answer differs, or where ours refuses to start without a sentence.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import results
from feature_answers import answers, difference
from request_features import Feature, pairs_of_features, single_features
from server_flags import Row, pair_rows, prepare, serve, single_rows

from vllm_instant.tools.demo import assets
from vllm_instant.tools.measure.servers import ServerError, terminable

OUTPUT = results.HERE / "results" / "same_answers.json"
DRAFTS = 8


def refusal(error: ServerError) -> dict[str, Any]:
    """Why a server did not start: its first error, and whether it is a sentence instead of a traceback."""
    prefix = r"^\([^)]*\)\s*([A-Z]+ [\d-]+ [\d:]+ \[\S+\])?"
    lines = [re.sub(prefix, "", line).strip() for line in error.log.splitlines() if line.strip()]
    named = [line for line in lines if re.match(r"(\w+\.)*\w*(Error|Exception)\b|vllm: error|.*: error: ", line)]
    said = named[0] if named else (lines or ["nothing"])[-1]
    return {"said": said[:400], "sentence": "Traceback" not in error.log}


class Table:
    """Measures rows.

    Args:
        folder: for files of the servers.
        kept: folder in which vLLM's answers stay, by flags, for later rows and later runs.

    """

    def __init__(self, folder: Path, kept: Path) -> None:
        self._paths = prepare(folder, assets.prepare().draft)
        self._features = [*single_features(), *pairs_of_features()]
        self._kept = kept
        kept.mkdir(parents=True, exist_ok=True)

    def _file(self, row: Row, features: Sequence[Feature]) -> Path:
        asked = json.dumps([row.words_of_vllm, [[feature.path, feature.body] for feature in features], "twice"])
        return self._kept / f"{hashlib.sha256(asked.encode()).hexdigest()[:16]}.json"

    def _theirs(self, row: Row, features: Sequence[Feature]) -> Any:
        """What vLLM answers, and the requests that it answers otherwise when it is asked a second time."""
        file = self._file(row, features)
        if not file.exists():
            try:
                with serve(row, False, self._paths) as server:
                    first, again = (answers(server.url, features, clients=row.clients) for _ in range(2))
                    if not server.healthy():
                        raise ServerError("vLLM's own engine died while it answered", server)
                varying = [name for name in first if difference(again[name], first[name]) is not None]
                file.write_text(json.dumps({"answers": first, "varying": varying}))
            except ServerError as error:
                return {"refused": refusal(error)}
        return json.loads(file.read_text())

    def measure(self, row: Row, until: float) -> dict[str, Any] | None:
        """One row of the table; None where there is time for vLLM's answers only, which are kept.

        Args:
            row: the row.
            until: time after which our server is not started any more, monotonic.

        """
        cell: dict[str, Any] = {"row": row.name, "words": [*row.words], "ours": [*row.ours]}
        features = [feature for feature in self._features if row.survives(feature)]
        kept = self._theirs(row, features)
        if "refused" in kept:
            return cell | {"vllm_refused": kept["refused"]}
        theirs = {name: one for name, one in kept["answers"].items() if name not in kept["varying"]}
        if time.monotonic() > until:
            return None
        try:
            with serve(row, True, self._paths) as server:
                found = [answers(server.url, features, drafts, row.clients) for drafts in (None, DRAFTS)]
                alive = server.healthy()
                metrics = server.metrics()
        except ServerError as error:
            return cell | {"refused": refusal(error)}
        different = []
        for pinned, mine in zip((False, True), found, strict=True):
            for name, one in theirs.items():
                where = difference(mine[name], one)
                if where is not None:
                    different.append({"feature": name, "pinned": pinned, "where": where})
        return cell | {
            "requests": 2 * len(theirs),
            "equal": 2 * len(theirs) - len(different),
            "different": different,
            "varying": kept["varying"],
            "refused_by_both": sum(one["status"] != 200 for one in theirs.values()),
            "drafts": metrics.get("vllm_instant:draft_tokens_proposed_total", 0.0),
            "switched_off": metrics.get("vllm_instant:plugin_failures_total", 0.0),
            "alive": alive,
        }


def is_fault(cell: Mapping[str, Any]) -> bool:
    """Whether a row found an answer that differs, or a start that failed without a sentence."""
    return bool(cell.get("different")) or not cell.get("refused", {}).get("sentence", True)


def main() -> None:
    """Measure rows until the time is over."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["single", "pairs"])
    parser.add_argument("--seconds", type=float, default=36_000.0, help="no server is started later than this")
    parser.add_argument("--answers", type=Path, default=assets.cache_folder("same-answers"), help="vLLM's answers")
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--only", default="", help="rows whose name contains this")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args()
    runs = json.loads(options.output.read_text())["runs"] if options.output.exists() else []
    before = {cell["row"]: cell for run in runs if run["name"] == options.part for cell in run["measured"]}
    rows = [row for row in (single_rows if options.part == "single" else pair_rows)() if options.only in row.name]
    began = time.monotonic()
    with terminable(), tempfile.TemporaryDirectory() as folder:
        table = Table(Path(folder), options.answers)
        for row in rows:
            if row.name in before and not (options.again and is_fault(before[row.name])):
                continue
            if time.monotonic() - began > options.seconds:
                break
            cell = table.measure(row, began + options.seconds)
            if cell is None:
                break
            shown = cell.get("vllm_refused") or cell.get("refused") or f"{cell['equal']} of {cell['requests']} equal"
            print(f"{time.monotonic() - began:.0f} s {row.name}: {shown}", flush=True)
            for one in cell.get("different", [])[:12]:
                print("   ", one, flush=True)
            before[row.name] = cell
            results.write(options.output, list(before.values()), name=options.part)
    sys.exit(any(map(is_fault, before.values())))


if __name__ == "__main__":
    main()
