"""First-party plugins; they use the public API of ``vllm_instant`` and the entry-point group of all plugins."""

from __future__ import annotations

from collections.abc import Iterable

from vllm_instant import Deployment, Plugin, hookimpl
from vllm_instant_plugins import baseline, drafters, speculation
from vllm_instant_plugins.attention.plugin import PLUGINS as ATTENTION
from vllm_instant_plugins.chunked import plugin as chunked
from vllm_instant_plugins.escalation import plugin as escalation
from vllm_instant_plugins.goodput.plugin import PLUGIN as GOODPUT
from vllm_instant_plugins.guard import plugin as guard
from vllm_instant_plugins.hybrid import plugin as hybrid
from vllm_instant_plugins.remote import plugin as remote
from vllm_instant_plugins.samplers.plugin import PLUGINS as SAMPLERS
from vllm_instant_plugins.similarity.plugin import PLUGIN as SIMILARITY
from vllm_instant_plugins.suffix.plugin import PLUGIN as SUFFIX
from vllm_instant_plugins.super_expert.plugin import PLUGINS as EXPERTS


@hookimpl
def instant_plugins() -> Iterable[Plugin]:
    """Everything in this package, vLLM's own behaviour included."""
    return [
        GOODPUT,
        *speculation.PLUGINS,
        SUFFIX,
        hybrid.PLUGIN,
        remote.PLUGIN,
        *drafters.PLUGINS,
        *SAMPLERS,
        SIMILARITY,
        *ATTENTION,
        *EXPERTS,
        *chunked.PLUGINS,
        *guard.PLUGINS,
        *escalation.PLUGINS,
        *baseline.PLUGINS,
    ]


@hookimpl
def instant_check(deployment: Deployment) -> Iterable[str]:
    """Problems of a deployment with these plugins."""
    return [
        *speculation.validate(deployment),
        *drafters.validate(deployment),
        *hybrid.validate(deployment),
        *remote.validate(deployment),
        *chunked.validate(deployment),
        *guard.validate(deployment),
        *escalation.validate(deployment),
    ]
