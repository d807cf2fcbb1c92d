"""Compares two results: whether a deployment has become better or worse."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm_instant.tools.bench.plan import BadInputError, deployed
from vllm_instant.tools.bench.rows import BenchRow
from vllm_instant.tools.measure.significance import Contrast

RowChange = tuple[BenchRow, str, Contrast | None]
"""Row, arm and contrast; None where one of the results lacks it."""


def row_changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[RowChange]:
    """How each row's comparison with the baseline has changed.

    Each run had its own baseline servers, and the comparisons with them are compared: another machine, or a busier
    one, affects both sides.

    Raises:
        BadInputError: when the results have different models or no arm in common.

    """
    if before["model"] != after["model"]:
        raise BadInputError(f"the results have different models: {before['model']} and {after['model']}")
    arms = [arm for arm in deployed(list(after["arms"])) if arm in before["arms"]]
    if not arms:
        raise BadInputError("the results have no deployment in common: --arm names it")
    earlier = {(row.group, row.name): row for row in map(BenchRow.read, before["rows"])}
    found: list[RowChange] = []
    for arm in arms:
        for row in map(BenchRow.read, after["rows"]):
            then = earlier.get((row.group, row.name))
            both = then is not None and arm in then.contrasts and arm in row.contrasts
            change = row.contrasts[arm].since(then.contrasts[arm]) if both and then is not None else None
            found.append((row, arm, change))
    return found
