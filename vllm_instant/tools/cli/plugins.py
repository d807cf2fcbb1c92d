"""``vllm-instant plugins``: the installed plugins."""

from __future__ import annotations

import sys

from vllm_instant.deployment.plugin_manager import plugin_manager
from vllm_instant.tools.cli.common import print_columns


def list_plugins() -> None:
    """List the installed plugins: slot, name, distribution, version, lossy or lossless, what they do."""
    manager = plugin_manager()
    print_columns(
        ("slot", "plugin", "distribution", "version", "quality", "what it does"),
        (
            (
                offer.plugin.slot,
                offer.plugin.name,
                offer.distribution,
                offer.version,
                "lossy" if offer.plugin.lossy else "lossless",
                offer.plugin.summary,
            )
            for offer in manager.installed_plugins()
        ),
    )
    for broken in manager.broken:
        print(f"vllm-instant: {broken}", file=sys.stderr)
