"""Compiling with and without a place to keep the result."""

from vllm_instant_plugins import jit


def _double(x):
    return 2 * x


def test_it_compiles():
    function = jit.compiled(_double)
    assert function(4) == 8
    assert function.signatures


def test_without_a_folder_to_write_to_it_compiles_all_the_same(monkeypatch):
    njit = jit.njit

    def unwritable(*arguments, **options):
        if options.get("cache"):
            raise RuntimeError("cannot cache function: no locator available")
        return njit(*arguments, **options)

    monkeypatch.setattr(jit, "njit", unwritable)
    assert jit.compiled(_double)(4) == 8
