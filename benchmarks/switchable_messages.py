"""A drafter for ``worker_messages.py`` with which a worker answers as vLLM has it, or at once, while it serves.

As ``switchable_drafter.SwitchableDrafter``, whose control file it reads; in it ``"at_once": false`` switches
``vllm_instant.patches.cpu.single_rpc`` off.
"""

from __future__ import annotations

import json
import os
from typing import Any

from switchable_drafter import SwitchableDrafter

from vllm_instant.patches.cpu import single_rpc


class SwitchableMessages(SwitchableDrafter):
    """Random draft tokens, and the switch."""

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """There is no model to load; the worker's runner exists now."""
        may_sample = single_rpc._may_sample
        read_at, at_once = 0, True

        def may_sample_now(runner: Any) -> bool:
            nonlocal read_at, at_once
            changed = os.stat(self.control).st_mtime_ns
            if changed != read_at:
                with open(self.control) as file:
                    read_at, at_once = changed, bool(json.load(file).get("at_once", True))
            return at_once and may_sample(runner)

        single_rpc._may_sample = may_sample_now
