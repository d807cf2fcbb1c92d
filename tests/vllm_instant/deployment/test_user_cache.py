"""The user's cache, also of a user who has none."""

import os
import pwd

import pytest

from vllm_instant.deployment.user_cache import user_cache
from vllm_instant.patches import compat_cache
from vllm_instant.patches.compat import VllmPatch
from vllm_instant_plugins.state_store import PersistentState, default_folder

pytestmark = pytest.mark.unit


@pytest.fixture
def homeless(monkeypatch, tmp_path):
    """A user id without an entry in passwd and without HOME, in a folder that can be written."""

    def unknown(uid):
        raise KeyError(uid)

    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_it_is_the_systems_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert user_cache("costs") == tmp_path / "vllm-instant" / "costs"


def test_a_user_without_a_home_keeps_nothing_and_gets_no_folder(homeless):
    state = PersistentState(default_folder("costs"), {"model": "m"})
    state.save({"noise": 1.0})
    assert state.load() is None
    patch = VllmPatch("name", "purpose", ())
    assert compat_cache.unsupported_reason((patch,), homeless, user_cache("patches.json")) == {"name": None}
    assert os.listdir(homeless) == []
