"""First-party policies, without an engine."""

from hypothesis import given
from hypothesis import strategies as st

from vllm_instant import RequestState, UpcomingStep
from vllm_instant_plugins.speculation import Fixed


@given(st.none() | st.integers(0, 9), st.none() | st.integers(1, 9), st.integers(0, 12), st.integers(0, 8))
def test_fixed(length, max_batch_size, requests, most):
    states = [RequestState(f"r{i}", 1, 1, 0.0) for i in range(requests)]
    lengths = Fixed(length, max_batch_size).get_num_draft_tokens(UpcomingStep(states, most))
    too_many = max_batch_size is not None and requests > max_batch_size
    wanted = 0 if too_many else min(most, length if length is not None else most)
    assert lengths == [wanted] * requests


def test_first_party_plugins_use_only_the_public_api():
    import ast
    from pathlib import Path

    import vllm_instant_plugins

    for path in Path(vllm_instant_plugins.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for module in modules:
                assert not module.startswith(("vllm_instant.", "vllm.")), f"{path.name} imports {module}"
                assert module != "vllm"


def test_only_seams_import_vllm():
    import ast
    from pathlib import Path

    import vllm_instant

    root = Path(vllm_instant.__file__).parent
    for path in root.rglob("*.py"):
        if "patches" in path.relative_to(root).parts:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(m == "vllm" or m.startswith("vllm.") for m in modules), f"{path} imports vLLM"
