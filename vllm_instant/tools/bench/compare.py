"""Two records: whether a deployment has become better or worse since the earlier one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm_instant.tools.bench.plan import BadInputError, deployed
from vllm_instant.tools.bench.rows import BenchRow
from vllm_instant.tools.measure.significance import Contrast

RowChange = tuple[BenchRow, str, Contrast | None]
"""Of one row and arm; None where one of the records has no number for it."""


def row_changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[RowChange]:
    """How each row's comparison with stock has changed.

    Each record was measured beside its own stock servers, and it is these comparisons that are compared: another
    machine, or a busier one, moves both sides.

    Raises:
        BadInputError: when the records have different models or no arm in common.

    """
    if before["model"] != after["model"]:
        raise BadInputError(f"the records have different models: {before['model']} and {after['model']}")
    arms = [arm for arm in deployed(list(after["arms"])) if arm in before["arms"]]
    if not arms:
        raise BadInputError("the records have no deployment in common: --arm names it")
    earlier = {(row.group, row.name): row for row in map(BenchRow.read, before["rows"])}
    found: list[RowChange] = []
    for arm in arms:
        for row in map(BenchRow.read, after["rows"]):
            then = earlier.get((row.group, row.name))
            both = then is not None and arm in then.contrasts and arm in row.contrasts
            change = row.contrasts[arm].since(then.contrasts[arm]) if both and then is not None else None
            found.append((row, arm, change))
    return found
