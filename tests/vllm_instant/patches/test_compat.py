"""The signature checks against made-up sources, and the patches against really supported versions."""

import json

import pytest
from vllm_releases import NEWEST

from vllm_instant.patches import compat_cache, registry
from vllm_instant.patches.compat import (
    HasAttribute,
    HasSignature,
    HasStatements,
    References,
    RequirementError,
    VllmPatch,
    installed_vllm,
)

SOURCE = """
LIMIT: int = 3

class Engine:
    size: int

    def __init__(self, config, extra=None):
        self.queue = []

    async def step(self, batch, *, flag=False):
        return self.queue.pop()

def helper(a, b):
    pass

def prepare(a):
    a = 2 * a
    b = a+1
    return helper(a, b)
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "engine.py").write_text(SOURCE)
    (tmp_path / "broken.py").write_text("def (:")
    return tmp_path


@pytest.mark.parametrize(
    "requirement",
    [
        HasSignature("engine.py", "helper", ("a", "b"), exact=True),
        HasSignature("engine.py", "Engine.step", ("self", "batch"), exact=True),
        HasSignature("engine.py", "Engine.__init__", ("self", "config"), exact=True),
        HasSignature("engine.py", "helper", ("a",)),
        HasAttribute("engine.py", "Engine.size"),
        HasAttribute("engine.py", "LIMIT"),
        References("engine.py", "Engine.step", ("queue", "pop")),
        HasStatements("engine.py", "prepare", ("b = a + 1", "return helper(a, b)")),
    ],
)
def test_what_holds(folder, requirement):
    requirement.check(folder)


@pytest.mark.parametrize(
    ("requirement", "words"),
    [
        (HasSignature("engine.py", "helper", ("a", "c")), "helper takes (a, b), not (a, c"),
        (HasSignature("engine.py", "helper", ("a",), exact=True), "needs more arguments now"),
        (HasSignature("engine.py", "LIMIT", ()), "no longer a function"),
        (HasSignature("engine.py", "Engine.stop", ("self",)), "has no Engine.stop"),
        (HasAttribute("engine.py", "Engine.width"), "has no Engine.width"),
        (HasAttribute("gone.py", "x"), "gone.py is gone"),
        (References("engine.py", "Engine.step", ("pop", "push")), "no longer uses push"),
        (
            HasStatements("engine.py", "prepare", ("a = 2 * a", "return helper(a, b)")),
            "prepare no longer contains: a = 2 * a; r",
        ),
        (HasStatements("engine.py", "prepare", ("return helper(a, b)", "b = a + 1")), "prepare no longer contains"),
        (HasStatements("engine.py", "LIMIT", ()), "no longer a function"),
    ],
)
def test_what_does_not_hold_is_said(folder, requirement, words):
    with pytest.raises(RequirementError) as caught:
        requirement.check(folder)
    assert words in str(caught.value)


def test_a_seam_lists_everything_that_is_different(folder):
    patch = VllmPatch(
        "s", "p", (HasAttribute("engine.py", "A"), HasAttribute("engine.py", "B"), HasAttribute("broken.py", "C"))
    )
    unsupported_reason = patch.unsupported_reason(folder)
    assert "has no A" in unsupported_reason
    assert "has no B" in unsupported_reason
    assert "cannot be parsed" in unsupported_reason


class TestVerdicts:
    PATCHES = (
        VllmPatch("good", "p", (HasAttribute("engine.py", "LIMIT"),)),
        VllmPatch("bad", "p", (HasAttribute("engine.py", "A"),)),
    )

    def test_they_are_those_of_the_check(self, folder, tmp_path):
        found = compat_cache.unsupported_reason(self.PATCHES, folder, tmp_path / "cache.json")
        assert found == {"good": None, "bad": "engine.py has no A"}

    def test_the_second_time_nothing_is_read(self, folder, tmp_path, monkeypatch):
        cache = tmp_path / "cache.json"
        first = compat_cache.unsupported_reason(self.PATCHES, folder, cache)
        monkeypatch.setattr(VllmPatch, "unsupported_reason", lambda *_: pytest.fail("read again"))
        assert compat_cache.unsupported_reason(self.PATCHES, folder, cache) == first

    def test_a_changed_file_or_requirement_is_checked_anew(self, folder, tmp_path):
        cache = tmp_path / "cache.json"
        compat_cache.unsupported_reason(self.PATCHES, folder, cache)
        (folder / "engine.py").write_text(SOURCE + "A = 1\n")
        assert compat_cache.unsupported_reason(self.PATCHES, folder, cache)["bad"] is None
        other = (VllmPatch("bad", "p", (HasAttribute("engine.py", "B"),)),)
        assert compat_cache.unsupported_reason(other, folder, cache) == {"bad": "engine.py has no B"}

    @pytest.mark.parametrize(
        "content",
        [
            *("", "[]", "{}", '{"key": 3}', "null", "[" * 100_000, '{"key": "KEY"}'),
            *('{"key": "KEY", "unsupported_reason": 3}', '{"key": "KEY", "unsupported_reason": {"bad": "x"}}'),
        ],
    )
    def test_a_damaged_cache_is_as_good_as_none(self, folder, tmp_path, content):
        cache = tmp_path / "cache.json"
        compat_cache.unsupported_reason(self.PATCHES, folder, cache)
        cache.write_text(content.replace("KEY", json.loads(cache.read_text())["key"]))
        assert compat_cache.unsupported_reason(self.PATCHES, folder, cache)["good"] is None

    def test_a_folder_that_cannot_be_written_does_no_harm(self, folder, tmp_path):
        (tmp_path / "file").write_text("")
        assert compat_cache.unsupported_reason(self.PATCHES, folder, tmp_path / "file" / "cache.json")["good"] is None


@pytest.mark.parametrize("patch", registry.PATCHES, ids=lambda patch: patch.name)
def test_every_seam_fits_the_installed_version(patch):
    folder = installed_vllm()
    assert folder is not None, "vLLM is not installed"
    assert registry.in_supported_range()
    assert patch.unsupported_reason(folder) is None


@pytest.mark.parametrize("patch", registry.PATCHES, ids=lambda patch: patch.name)
def test_every_seam_fits_the_newest_release(patch, newest_release):
    assert registry.SUPPORTED.contains(NEWEST)
    assert patch.unsupported_reason(newest_release) is None
