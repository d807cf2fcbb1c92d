"""The command line of every server that a bench starts."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_instant.deployment.secrets import masked_text, masked_words
from vllm_instant.deployment.settings import resolve
from vllm_instant.interfaces.deployment import Deployment
from vllm_instant.tools.bench.plan import BASELINE, BASELINE_AGAIN, OURS
from vllm_instant.tools.measure.server_info import authorization
from vllm_instant.tools.measure.servers import words_of

DEMO = "demo"
_NOT_SHARED = ("speculative_config", "model")
"""Engine arguments that the baseline does not get: the drafter is what a deployment adds."""
_EAGER = "--enforce-eager"


@dataclass(frozen=True)
class ArmCommands:
    """What is started."""

    model: str
    words: dict[str, list[str]]
    """Further words of each arm's command line."""
    deployments: dict[str, str]
    """What each arm serves, as text for the reports."""
    headers: dict[str, str] = field(default_factory=dict)
    """Of all requests: the key of a deployment file that has one."""

    def setup(self) -> dict[str, Any]:
        """The settings that an interrupted run must keep, as JSON types."""
        return {"model": self.model, "deployments": self.deployments}


def arm_commands(
    model: str,
    config: Path | None,
    overrides: Sequence[str],
    named: Mapping[str, str],
    words: Sequence[str],
) -> ArmCommands:
    """The baseline twice, with the engine arguments of the first deployment, and each deployment.

    Args:
        model: of all arms; ``demo`` is the demo's pair.
        config: deployment file of the first deployment.
        overrides: ``TABLE.KEY=VALUE``, over every deployment file.
        named: further deployment files by arm.
        words: further words of every command line.

    Raises:
        DeploymentError: when a deployment cannot be served.

    """
    overrides = list(overrides)
    if model == DEMO and not Path(model).exists():
        from vllm_instant.tools.demo import assets, setups

        pair = assets.prepare()
        model, config = str(pair.target), config or setups.DEPLOYMENT
        overrides = [f"drafter.model={pair.draft}", *overrides]
    files: dict[str, Path | None] = {OURS: config, **{name: Path(file) for name, file in named.items()}}
    resolved = {name: resolve(file, overrides) for name, file in files.items()}
    words = [*words, *_eager_for_all(resolved, words)]
    shared = {key: value for key, value in resolved[OURS].vllm.items() if key not in _NOT_SHARED}
    baseline = [*words_of(shared), *words]
    commands = {BASELINE: baseline, BASELINE_AGAIN: baseline}
    shown = shlex.join(masked_words(baseline))
    deployments = {BASELINE: shown, BASELINE_AGAIN: shown}
    settings = [f"--instant-set={override}" for override in overrides]
    for name, file in files.items():
        chosen = ["--instant-config", str(file)] if file is not None else []
        commands[name] = [*words, "--plugins", "vllm_instant", *chosen, *settings]
        text = file.read_text(encoding="utf-8") if file is not None else "the defaults"
        described = [text.rstrip(), *(f"# --instant-set {override}" for override in overrides)]
        deployments[name] = masked_text("\n".join(described))
    return ArmCommands(model, commands, deployments, authorization(_key(resolved[OURS])))


def _eager_for_all(deployments: Mapping[str, Deployment], words: Sequence[str]) -> list[str]:
    """Compiled and eager arms cannot be compared: if one of them is eager, all are."""
    eager = any(deployment.vllm.get("enforce_eager") for deployment in deployments.values())
    return [_EAGER] if eager and _EAGER not in words else []


def _key(deployment: Deployment) -> str | None:
    """The API key that the servers will want."""
    key = deployment.vllm.get("api_key")
    found = key[0] if isinstance(key, list) and key else key
    return str(found) if found else None
