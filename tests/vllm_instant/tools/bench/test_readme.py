"""The README's tables are what the committed results say."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[4]


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("readme_results", ROOT / "tools/readme_results.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_readme_shows_the_committed_results(tool):
    readme = tool.README.read_text(encoding="utf-8")
    assert tool.updated(readme) == readme, "run tools/readme_results.py"


@pytest.mark.parametrize("table", ["bench", "regret", "drafters", "sources", "block_gain"])
def test_another_number_would_be_seen(tool, table, tmp_path):
    shutil.copytree(tool.RESULTS, tmp_path / "results")
    file = tmp_path / "results" / tool.TABLES[table][0]
    shown = tool.updated(tool.README.read_text(encoding="utf-8"))
    file.write_text(json.dumps(_doubled(json.loads(file.read_text(encoding="utf-8")))))
    assert tool.updated(shown, tmp_path / "results") != shown


def _doubled(value):
    if isinstance(value, float):
        return 2 * value
    if isinstance(value, list):
        return [_doubled(item) for item in value]
    return {key: _doubled(item) for key, item in value.items()} if isinstance(value, dict) else value


def test_the_command_of_the_result_is_the_readmes(tool):
    """What a reader is told to run is what was run (but for where the result goes)."""
    record = json.loads((tool.RESULTS / "bench_demo.json").read_text(encoding="utf-8"))
    command = record["command"].partition(" --output")[0]
    assert f"```console\n{command}\n```" in tool.README.read_text(encoding="utf-8")


def test_a_readme_without_the_markers_is_refused(tool):
    with pytest.raises(SystemExit, match="has no place for a table: <!-- table: bench -->"):
        tool.updated("# no markers")
