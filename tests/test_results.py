"""The tables of the results page and of the README are what the committed result files say."""

import importlib
import json
import re
import shutil
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.unit
ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results"
PAGES = ["docs/results.md", "README.md"]
MAX_README_LINES = 130
CONDITIONS = {"command", "date", "commit", "device", "versions"}

sys.path.insert(0, str(ROOT / "tools"))
page_tool = importlib.import_module("results_page")
tables = importlib.import_module("result_tables_by_part")


@pytest.fixture
def results_page():
    return (ROOT / "docs/results.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES)
def test_a_page_shows_the_committed_results(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    assert page_tool.updated(text) == text, "run tools/results_page.py"


def test_every_table_is_on_the_page(results_page):
    shown = page_tool.shown(results_page)
    assert set(tables.ALL_TABLES) <= shown
    assert "summary" in page_tool.shown((ROOT / "README.md").read_text(encoding="utf-8"))


@pytest.mark.parametrize("file", sorted(path.stem for path in RESULTS.glob("*.json")))
def test_every_result_file_is_on_the_page_with_its_runs(file, results_page):
    assert f"runs of {file}" in page_tool.shown(results_page)
    assert any(shown == file for shown, _ in tables.ALL_TABLES.values())


@pytest.mark.parametrize("file", sorted(RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_every_run_says_how_it_was_made(file):
    record = json.loads(file.read_text(encoding="utf-8"))
    for run in record.get("runs", [record]):
        assert run.keys() >= CONDITIONS
        assert all(run[key] for key in CONDITIONS), run["command"]


MEASURED = sorted(
    name
    for name in tables.ALL_TABLES
    if "Not measured yet." not in page_tool.updated(f"<!-- table: {name} -->\n<!-- end of table -->")
)


OF_TEXTS = ("demo_answers", "same_answers_differences")
"""Tables without a measured number."""


@pytest.mark.parametrize("name", [name for name in MEASURED if name not in OF_TEXTS])
def test_another_number_would_be_seen(name, tmp_path):
    file, _ = tables.ALL_TABLES[name]
    block = f"<!-- table: {name} -->\n<!-- end of table -->"
    before = page_tool.updated(block)
    shutil.copy(RESULTS / f"{file}.json", tmp_path)
    record = json.loads((RESULTS / f"{file}.json").read_text(encoding="utf-8"))
    changes = []
    for kind in (float, int):
        (tmp_path / f"{file}.json").write_text(json.dumps(_doubled(record, kind)))
        try:
            changes.append(page_tool.updated(block, tmp_path) != before)
        except (KeyError, ValueError, StopIteration):
            changes.append(True)
    assert any(changes)


def test_another_answer_would_be_seen(tmp_path):
    record = json.loads((RESULTS / "demo.json").read_text(encoding="utf-8"))
    record["runs"][0]["measured"][0]["answer"] += " and more"
    (tmp_path / "demo.json").write_text(json.dumps(record))
    block = "<!-- table: demo_answers -->\n<!-- end of table -->"
    assert page_tool.updated(block, tmp_path) != page_tool.updated(block)


def test_another_difference_would_be_seen(tmp_path):
    record = json.loads((RESULTS / "same_answers.json").read_text(encoding="utf-8"))
    record["runs"][0]["measured"][0]["different"].append({"feature": "seeded", "pinned": False, "where": "text"})
    (tmp_path / "same_answers.json").write_text(json.dumps(record))
    block = "<!-- table: same_answers_differences -->\n<!-- end of table -->"
    assert page_tool.updated(block, tmp_path) != page_tool.updated(block)


def _doubled(value, kind):
    if type(value) is kind:
        return 2 * value + 1
    if isinstance(value, list):
        return [_doubled(item, kind) for item in value]
    return {key: _doubled(item, kind) for key, item in value.items()} if isinstance(value, dict) else value


def test_a_table_without_a_result_file_says_so(tmp_path):
    block = "<!-- table: drafters -->\n<!-- end of table -->\n<!-- table: runs of drafters -->\n<!-- end of table -->"
    assert page_tool.updated(block, tmp_path).count("Not measured yet.") == 2


def _burst(speed):
    return {"tokens_per_second": speed}


def _promise_cell(users, best, **speeds):
    keys = ("tokens_per_second", "ttft_ms", "p50_itl_ms", "p99_itl_ms")
    arms = {arm: {key: {"median": found[0]} for key in keys} for arm, found in speeds.items()}
    ratio = {"median": 1.0, "low": 0.9, "high": 1.1}
    ours = dict.fromkeys(("to_best", "to_off", "latency_best_to_ours"), ratio) | {"best_by_round": best}
    rounds = {arm: [_burst(speed) for speed in found] for arm, found in speeds.items()}
    return {"part": "warm", "prompts": "edit", "users": users, "ours": {"ours": ours}, "arms": arms, "rounds": rounds}


def test_the_promise_names_the_fastest_length_and_compares_with_the_best_arm_of_each_round():
    speeds = {"off": [10, 10], "suffix, K=2": [20, 22], "suffix, K=8": [15, 15], "ours": [30, 33]}
    runs = [{"name": "", "device": "", "measured": [_promise_cell(4, ["suffix, K=2", "suffix, K=8"], **speeds)]}]
    [row] = tables.promise(runs, "warm").splitlines()[2:]
    assert row.startswith("| edit | 4 | 2 | 10 | 20 (K=2) | | 30 | | 1.00 [0.90, 1.10] |")
    assert tables.promise(runs, "cold").count("\n") == 1
    [row] = tables.promise_by_users(runs, "warm").splitlines()[2:]
    assert row == "| ours | 4 | 2 | 3.15 [3.00, 3.30] | 1.85 [1.50, 2.20] |"
    once = {arm: found[:1] for arm, found in speeds.items()}
    [row] = tables.promise(
        [{"name": "", "device": "", "measured": [_promise_cell(4, ["off"], **once)]}], "warm"
    ).splitlines()[2:]
    assert row.startswith("| edit | 4 | 1 | 10 | 20 (K=2) | | 30 | | 1.00 [0.90, 1.10] |")
    assert tables.interval({"median": 1.5, "low": 1.5, "high": 1.5}) == "1.50", "one round has no interval"


def test_an_unknown_table_is_refused():
    with pytest.raises(SystemExit, match="no table is called nonsense; there are bench, "):
        page_tool.updated("<!-- table: nonsense -->\n<!-- end of table -->")


def test_every_script_that_the_page_names_exists(results_page):
    prose = re.sub(r"<!-- table.*?<!-- end of table -->", "", results_page, flags=re.DOTALL)
    scripts = re.findall(r"`(benchmarks/\w+\.py)", prose)
    assert len(scripts) > 8
    assert [script for script in scripts if not (ROOT / script).exists()] == []


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= MAX_README_LINES
