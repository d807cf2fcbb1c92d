"""Import rules that the contracts in pyproject.toml cannot state: circles of files, and what the plugin API loads."""

from __future__ import annotations

import graphlib

import grimp
import pytest

PACKAGES = ["vllm_instant", "vllm_instant_plugins", "vllm_instant_kernels", "vllm_instant_loadtests"]


@pytest.fixture(scope="module")
def imports() -> grimp.ImportGraph:
    return grimp.build_graph(*PACKAGES, include_external_packages=True, cache_dir=None)


@pytest.fixture(scope="module")
def imports_at_run_time() -> grimp.ImportGraph:
    return grimp.build_graph(
        *PACKAGES, include_external_packages=True, exclude_type_checking_imports=True, cache_dir=None
    )


def circle_of(imports: dict[str, set[str]]) -> list[str]:
    """The files of one import circle, or nothing."""
    try:
        graphlib.TopologicalSorter(imports).prepare()
    except graphlib.CycleError as error:
        return list(error.args[1])
    return []


def test_no_files_import_each_other_in_a_circle(imports):
    ours = {module for module in imports.modules if module.partition(".")[0] in PACKAGES}
    edges = {module: imports.find_modules_directly_imported_by(module) & ours for module in ours}
    assert " -> ".join(circle_of(edges)) == ""


def test_a_circle_is_named():
    assert circle_of({"a": {"b"}, "b": {"c"}, "c": {"a"}})
    assert not circle_of({"a": {"b", "c"}, "b": {"c"}, "c": set()})


@pytest.mark.parametrize("library", ["torch", "numba", "vllm", "prometheus_client"])
def test_the_plugin_api_loads_no_heavy_library(imports_at_run_time, library):
    importers = imports_at_run_time.find_modules_that_directly_import(library)
    assert not {module for module in importers if module.startswith("vllm_instant.interfaces")}
