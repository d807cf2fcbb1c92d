"""The row of the table about capacity, from the file that ``vllm-instant loadtest capacity`` has written."""

from __future__ import annotations

import json
from pathlib import Path

from vllm_instant.tools.bench.plan import BASELINE, OURS, BadInputError
from vllm_instant.tools.bench.rows import BenchRow
from vllm_instant.tools.measure.significance import Contrast
from vllm_instant.tools.measure.statistics import Estimate

GROUP = "capacity"


def capacity_row(file: Path) -> BenchRow:
    """The highest rate at which the goals held, of the file's first server (vLLM) and of its last one (the deployment).

    Raises:
        BadInputError: where the file is no result of a capacity search with at least two servers.

    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        goals = ", ".join(found["plan"]["goals"])
        first, *_, last = found["servers"]
        rates = {arm: Estimate(**server["rate"]) for arm, server in ((BASELINE, first), (OURS, last))}
        pair = (last["server"], first["server"])
        contrasts = [Contrast.read(one) for one in found["comparisons"] if (one["ours"], one["theirs"]) == pair]
    except OSError as error:
        raise BadInputError(f"--capacity {file} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        raise BadInputError(
            f"--capacity {file} should be the capacity.json of a search with two servers, vLLM's first"
        ) from None
    row = BenchRow(GROUP, f"requests per second within {goals}", "1/s", rates)
    if contrasts:
        row.contrasts[OURS] = contrasts[0]
    else:
        row.missing, row.values = "the search found no capacity of one of the servers", {}
    return row
