"""The row that a capacity search adds to the table."""

from __future__ import annotations

import json

import pytest

from vllm_instant.tools.bench.capacity_row import capacity_row
from vllm_instant.tools.bench.plan import BASELINE, OURS, BadInputError
from vllm_instant.tools.measure.significance import Contrast
from vllm_instant.tools.measure.statistics import Estimate


def result(**changes):
    ratio = Contrast("ratio", "higher", *[Estimate(1.3, 1.2, 1.4)] * 2, Estimate(1, 1, 1), 1.1, 1.1, 12)
    servers = [
        {"server": name, "rate": {"mean": rate, "low": rate - 1, "high": rate + 1}}
        for name, rate in (("vllm", 10.0), ("ours", 13.0))
    ]
    compared = [{"ours": "ours", "theirs": "vllm", "sentence": "ours carries 1.30×", **ratio.plain()}]
    return {"plan": {"goals": ["ttft_p95_ms=500"]}, "servers": servers, "comparisons": compared, **changes}


def read(tmp_path, found):
    file = tmp_path / "capacity.json"
    file.write_text(json.dumps(found))
    return capacity_row(file)


def test_the_first_server_is_the_baseline_and_the_last_one_ours(tmp_path):
    row = read(tmp_path, result())
    assert (row.values[BASELINE].mean, row.values[OURS].mean) == (10, 13)
    assert row.contrasts[OURS].verdict == "better"
    assert row.name == "requests per second within ttft_p95_ms=500"


def test_a_search_without_a_capacity_has_no_numbers(tmp_path):
    row = read(tmp_path, result(comparisons=[]))
    assert (row.values, row.contrasts) == ({}, {})
    assert "found no capacity" in row.missing


@pytest.mark.parametrize("found", [[], {"plan": {}}, result(servers=[{"server": "vllm"}])])
def test_a_file_of_something_else_is_one_sentence(tmp_path, found):
    with pytest.raises(BadInputError, match=r"should be the capacity\.json of a search with two servers"):
        read(tmp_path, found)


def test_a_missing_file_is_one_sentence(tmp_path):
    with pytest.raises(BadInputError, match="cannot be read: No such file"):
        capacity_row(tmp_path / "none.json")
