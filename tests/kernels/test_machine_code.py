"""Resources of the kernels compiled ahead of time, as in the table of ``benchmarks/machine_code.py``, and their limits.

With the version of Triton of the recorded table no kernel may take more than recorded; the other tests hold for any
version.
"""

import json
from pathlib import Path

import compiled_kernels
import pytest
import triton

pytestmark = pytest.mark.kernel

RECORD = Path(__file__).resolve().parents[2] / "benchmarks/results/machine_code.json"
MAX_SHARED = 100 * 1024
"""Bytes: the smallest of these devices has 163 KB, and two programs should fit on the larger ones."""


def _name(row):
    return f"{row['kernel']}, {row['case']}, sm_{row['capability']}"


@pytest.fixture(scope="module")
def rows():
    table = compiled_kernels.table()
    print("\n" + compiled_kernels.printed(table))
    return table


@pytest.fixture(scope="module")
def ours(rows):
    return [row for row in rows if row["kernel"] != compiled_kernels.STOCK]


def test_nothing_spills(ours):
    assert [_name(row) for row in ours if row["spilled"]] == []


def test_shared_memory_leaves_room(ours):
    assert [_name(row) for row in ours if row["shared"] > MAX_SHARED] == []


def test_no_single_bytes_are_loaded(ours):
    """Keys are loaded 16 bytes at a time, values 16 or 8, scales and block tables 4."""
    assert [_name(row) for row in ours if "1" in row["loads"]] == []
    for row in ours:
        if row["kernel"].endswith("attention"):
            assert set(row["loads"]) <= {"4", "8", "16"}, _name(row)
            assert row["loads"].get("16", 0) >= 4, _name(row)
        if row["kernel"] == "fused_feed_forward":
            assert row["loads"].get("16", 0) >= 4, _name(row)


def test_products_use_tensor_cores(ours):
    for row in ours:
        assert (row["tensor_cores"] > 0) == (row["kernel"] != "rope_quantize_write"), _name(row)


def test_vllms_kernel_loads_single_bytes_and_takes_more_registers(rows):
    """vLLM's kernel over its own layout, compared where its programs have the same numbers of rows and keys.

    With several query tokens ours has rows for all of them; vLLM's has not, which takes fewer registers and reads the
    cache more than once.
    """
    ours = {(row["case"], row["capability"]): row for row in rows if row["kernel"] == "paged_attention"}
    compared = 0
    for row in rows:
        if row["kernel"] == compiled_kernels.STOCK:
            assert row["loads"]["1"] >= 32, _name(row)
            case, _, tiles = row["case"].partition(", tiles")
            if tiles and case.endswith("1 token"):
                of_ours = ours[case, row["capability"]]
                assert (of_ours["registers"], of_ours["spilled"]) < (row["registers"], row["spilled"]), _name(row)
                compared += 1
    assert compared == 2


def test_no_kernel_takes_more_than_recorded(rows):
    if not RECORD.exists():
        pytest.skip("nothing is recorded: run benchmarks/machine_code.py")
    recorded = json.loads(RECORD.read_text())["runs"][-1]["measured"]
    if triton.__version__ != recorded["triton"]:
        pytest.skip(f"recorded with Triton {recorded['triton']}")
    before = {_name(row): row for row in recorded["rows"]}
    worse = []
    for row in rows:
        then = before.get(_name(row))
        if then is None:
            worse.append(f"{_name(row)} is not recorded: run benchmarks/machine_code.py")
            continue
        for what in ("registers", "spilled", "shared"):
            if row[what] > then[what]:
                worse.append(f"{_name(row)}: {what} {then[what]} -> {row[what]}")
        if row["loads"] != then["loads"] or row["tensor_cores"] != then["tensor_cores"]:
            worse.append(f"{_name(row)}: instructions {then['loads']}, {then['tensor_cores']} -> {row['loads']}")
    assert worse == []
