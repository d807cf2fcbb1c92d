"""Self-contained HTML pages: jinja templates with a shared style, and plots as inline SVG."""

from __future__ import annotations

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined, Template

from vllm_instant.tools.html.plots import ARM_COLORS


def template(package: str, name: str) -> Template:
    """A page's template in a package; it can include ``style.css``."""
    loader = ChoiceLoader([PackageLoader(package, ""), PackageLoader("vllm_instant.tools.html", "")])
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.globals["arm_colors"] = ARM_COLORS
    return environment.get_template(name)
