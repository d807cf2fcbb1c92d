"""Keep this repository's folder names from shadowing other modules.

vLLM looks for an importable ``triton_kernels`` before it takes the copy that it vendors, and a folder of that name
in the current directory is importable (as an empty namespace package). Hiding such a folder makes vLLM find its own.
"""

from __future__ import annotations

import sys
from importlib.machinery import PathFinder

from vllm_instant.patches.compat import HasAttribute, References, VllmPatch

SHADOWED = "triton_kernels"


def hide_bare_folder(name: str = SHADOWED) -> bool:
    """Make ``name`` unimportable if it is only a folder without code; returns whether it was hidden.

    ``sys.modules[name] = None`` is Python's own way to say "not importable"; vLLM replaces the entry when it
    installs its vendored copy.
    """
    if name in sys.modules:
        return False
    spec = PathFinder.find_spec(name)
    if spec is None or spec.origin is not None:
        return False
    sys.modules[name] = None  # type: ignore[assignment]
    return True


PATCH = VllmPatch(
    name="module_names",
    purpose="keeps a folder called triton_kernels from hiding the module that vLLM vendors",
    requirements=(
        HasAttribute("utils/import_utils.py", "_has_module"),
        References("utils/import_utils.py", "import_triton_kernels", ("_has_module", "modules")),
    ),
    optional=True,
)
