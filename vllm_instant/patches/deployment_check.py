"""What each slot can do in a resolved deployment: rules over vLLM's own ``VllmConfig``.

The same options lead to different model runners, schedulers and CUDA graphs, by device, model and version of vLLM, and
each of these limits what a plugin can do. The scheduler logs the result when an engine starts, and exports it as a
metric; ``vllm-instant doctor --model`` prints it without starting one, also for a device that is not there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from vllm_instant.deployment import deployment_env
from vllm_instant.deployment.resolved import installed_plugin, is_default_drafter
from vllm_instant.interfaces.deployment import Deployment
from vllm_instant.patches import moe
from vllm_instant.patches.compat import HasAttribute, VllmPatch
from vllm_instant.patches.draft_lengths import fixed_length_reason
from vllm_instant.patches.full_graphs import HOST_DRAFTER, full_graphs_of
from vllm_instant.patches.plugin_factory import uses_drafter_plugin

LIMITED, REFUSED = "limited", "refused"
V1_HINT = "set VLLM_USE_V2_MODEL_RUNNER=0"


@dataclass(frozen=True)
class Finding:
    """One limit of a slot in a deployment."""

    slot: str
    verdict: str
    """``limited``: it serves with the limit that ``text`` states; ``refused``: the server will not start."""
    text: str
    """One sentence without a final stop."""


def summary_of(vllm_config: Any) -> str:
    """Model runner, scheduling, CUDA graphs, speculative method and the number of workers, in one line."""
    speculative, parallel = vllm_config.speculative_config, vllm_config.parallel_config
    mode = vllm_config.compilation_config.cudagraph_mode
    parts = [
        f"{'V2' if vllm_config.use_v2_model_runner else 'V1'} model runner",
        f"{'asynchronous' if vllm_config.scheduler_config.async_scheduling else 'synchronous'} scheduling",
        f"CUDA graphs {mode.name if mode is not None else 'NONE'}",
        f"speculative method {speculative.method}" if speculative is not None else "no speculation",
    ]
    for letters, name in (("TP", "tensor"), ("PP", "pipeline"), ("DP", "data")):
        size = getattr(parallel, f"{name}_parallel_size")
        if size > 1:
            parts.append(f"{letters} {size}")
    return ", ".join(parts)


def findings_of(vllm_config: Any, deployment: Deployment) -> list[Finding]:
    """All limits of the deployment's slots, in the order of the slots."""
    found = [
        Finding(slot, verdict, text)
        for slot, rules in RULES.items()
        for rule in rules
        for verdict, text in rule(vllm_config, deployment)
    ]
    order = list(deployment.slots)
    return sorted(found, key=lambda finding: order.index(finding.slot))


Rule = Callable[[Any, Deployment], Iterator[tuple[str, str]]]


def _speculates(vllm_config: Any, deployment: Deployment) -> bool:
    policy = installed_plugin(deployment, "speculation").plugin
    return vllm_config.speculative_config is not None and policy.build is not None


def _fixed_length(vllm_config: Any, deployment: Deployment) -> Iterator[tuple[str, str]]:
    if _speculates(vllm_config, deployment):
        reason = fixed_length_reason(vllm_config)
        if reason is not None:
            yield LIMITED, f"only verification follows the draft budget: {reason}"


def _graphs(vllm_config: Any, deployment: Deployment) -> Iterator[tuple[str, str]]:
    if not _speculates(vllm_config, deployment):
        return
    graphs = full_graphs_of(vllm_config)
    if graphs is None:
        return
    maximum = vllm_config.speculative_config.num_speculative_tokens
    if graphs.lengths == (maximum,):
        yield (
            LIMITED,
            f"a decoding step is one CUDA graph only if all requests verify {maximum} drafts; other steps take longer",
        )
    elif graphs.lengths == (0,):
        yield LIMITED, "a decoding step with drafts is not one CUDA graph, because their numbers differ"


def _pipeline(vllm_config: Any, deployment: Deployment) -> Iterator[tuple[str, str]]:
    if (
        _speculates(vllm_config, deployment)
        and vllm_config.use_v2_model_runner
        and vllm_config.parallel_config.pipeline_parallel_size > 1
        and not vllm_config.scheduler_config.async_scheduling
    ):
        yield (
            LIMITED,
            "pipeline parallelism on the V2 model runner needs asynchronous scheduling for right answers "
            "(vLLM issue 52071)",
        )


def _default_drafter(vllm_config: Any, deployment: Deployment) -> Iterator[tuple[str, str]]:
    off = installed_plugin(deployment, "speculation").plugin.build is None
    if is_default_drafter(deployment) and vllm_config.speculative_config is None and not off:
        yield (
            LIMITED,
            "no drafts: none is named, and the default is left out with this device, model or option; "
            '[drafter] plugin = "suffix" names it',
        )


def _host_drafter(vllm_config: Any, deployment: Deployment) -> Iterator[tuple[str, str]]:
    speculative = vllm_config.speculative_config
    on_host = speculative is not None and speculative.method == HOST_DRAFTER and not vllm_config.use_v2_model_runner
    if on_host and vllm_config.device_config.device_type != "cpu":
        yield LIMITED, "drafts are made on the host: on the V1 model runner, without asynchronous scheduling"


def _hybrid(vllm_config: Any, deployment: Deployment) -> Iterator[tuple[str, str]]:
    plugin = installed_plugin(deployment, "drafter").plugin
    speculative = vllm_config.speculative_config
    brings_model = plugin.build is not None and plugin.engine_arguments is not None
    if speculative is None or not brings_model or not uses_drafter_plugin(deployment, speculative):
        return
    if not vllm_config.use_v2_model_runner:
        return
    if plugin.build_on_device is None:
        yield REFUSED, f"needs the V1 model runner: {V1_HINT}"
    else:
        yield LIMITED, "the draft model runs in every step with drafts, also where the other source drafts"


def _sampler(vllm_config: Any, deployment: Deployment) -> Iterator[tuple[str, str]]:
    chosen = deployment.slots["rejection_sampler"].plugin
    if vllm_config.speculative_config is None or not vllm_config.use_v2_model_runner or chosen == "native":
        return
    if chosen in ("block", "token"):
        yield LIMITED, "vLLM's own kernels verify: seeded answers are those of vLLM with speculation"
    else:
        yield REFUSED, f"needs the V1 model runner: {V1_HINT}, or choose block or token"


def _experts(vllm_config: Any, deployment: Deployment) -> Iterator[tuple[str, str]]:
    if deployment.slots["experts"].plugin == "native":
        return
    reason = moe.unsupported_reason(vllm_config)
    if reason is not None:
        yield REFUSED, reason
    elif vllm_config.use_v2_model_runner:
        yield REFUSED, f"needs the V1 model runner: {V1_HINT}"


def _ranks(vllm_config: Any, deployment: Deployment) -> Iterator[tuple[str, str]]:
    policy = installed_plugin(deployment, "batching").plugin
    if policy.build is not None and vllm_config.parallel_config.data_parallel_size > 1:
        yield LIMITED, "each data-parallel rank orders its own queue"


RULES: dict[str, Sequence[Rule]] = {
    "speculation": (_fixed_length, _graphs, _pipeline),
    "drafter": (_default_drafter, _host_drafter, _hybrid),
    "rejection_sampler": (_sampler,),
    "experts": (_experts,),
    "batching": (_ranks,),
}


def resolve_config(words: Sequence[str]) -> tuple[Any, Deployment]:
    """Return vLLM's configuration of a ``vllm serve`` command line, and its deployment; no engine is started.

    The package's options must be on vLLM's command line already (``register.register``).

    Args:
        words: MODEL and options, without ``vllm serve``; they must select this package.

    """
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parsed = make_arg_parser(FlexibleArgumentParser()).parse_args(list(words))
    if getattr(parsed, "model_tag", None) is not None:
        parsed.model = parsed.model_tag
    deployment = deployment_env.get_deployment()
    if deployment is None:
        raise ValueError("the command line does not select vllm_instant")
    return AsyncEngineArgs.from_cli_args(parsed).create_engine_config(), deployment


PATCH = VllmPatch(
    name="deployment_check",
    purpose="says what each slot can do in this deployment",
    requirements=(
        HasAttribute("config/parallel.py", "ParallelConfig.pipeline_parallel_size"),
        HasAttribute("config/parallel.py", "ParallelConfig.data_parallel_size"),
        HasAttribute("config/scheduler.py", "SchedulerConfig.async_scheduling"),
        HasAttribute("config/vllm.py", "VllmConfig.use_v2_model_runner"),
    ),
    optional=True,
)
