"""Into which CUDA graph mode vLLM's dispatchers send steps with given draft lengths; prints JSON.

    python -m v2.dispatch

Dispatch is plain Python in vLLM. Only the capture of graphs needs a device, and it is left out.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

NUM_SPECULATIVE_TOKENS = 4
MAX_NUM_SEQS = 64
CAPTURE_SIZES = sorted({1, 2, 4, *range(8, 513, 8)})
PIECEWISE = 0.1
"""Share by which steps outside of FULL graphs take longer: 0.066 to 0.216 measured in vLLM's issues 49548 and 49986."""
CONCURRENCY = (1, 8, 32)
ACCEPTANCE = (0.2, 0.8)

STEPS = {
    "8 requests without drafts": [0] * 8,
    "8 requests with 2 drafts": [2] * 8,
    "8 requests with 4 drafts": [4] * 8,
    "1 of 8 requests with 1 draft": [1] + [0] * 7,
    "8 requests with 0 to 4 drafts": [0, 1, 2, 3, 4, 4, 4, 4],
    "1 request without drafts": [0],
}

Dispatch = Callable[[Sequence[int]], tuple[str, int]]
"""Draft lengths of a decoding step → CUDA graph mode, number of tokens after padding."""


def v2_dispatcher(lengths: list[tuple[int, int, int]] | None) -> Dispatch:
    """The dispatcher of the V2 runner.

    Args:
        lengths: ``num_speculative_tokens_per_batch_size`` of the speculative config.

    """
    from vllm.config.compilation import CUDAGraphMode
    from vllm.v1.worker.gpu.cudagraph_utils import CudaGraphManager

    manager = CudaGraphManager.__new__(CudaGraphManager)
    manager.vllm_config = SimpleNamespace(
        speculative_config=SimpleNamespace(
            uses_dynamic_speculative_decoding=lambda: lengths is not None,
            num_speculative_tokens_per_batch_size=lengths,
        ),
        num_speculative_tokens=NUM_SPECULATIVE_TOKENS,
        cache_config=SimpleNamespace(use_kda_recoverssm=False),
        parallel_config=SimpleNamespace(data_parallel_size=1),
    )
    manager.compilation_config = SimpleNamespace(
        cudagraph_capture_sizes=CAPTURE_SIZES, max_cudagraph_capture_size=CAPTURE_SIZES[-1]
    )
    manager.cudagraph_mode = CUDAGraphMode.FULL_AND_PIECEWISE
    manager.decode_query_len = NUM_SPECULATIVE_TOKENS + 1
    manager.max_num_reqs = MAX_NUM_SEQS
    manager.varlen_decode = False
    manager.ubatch_runner = None
    manager.lora_capture_cases = [0]
    manager._lora_dispatch_map, manager._max_lora_case = {}, 0
    manager._candidates, manager._capture_descs = {}, {}
    manager._init_candidates()
    manager._graphs_captured = True

    def dispatch(drafts: Sequence[int]) -> tuple[str, int]:
        tokens = [1 + length for length in drafts]
        uniform = tokens[0] if len(set(tokens)) == 1 else None
        found = manager.dispatch(len(tokens), sum(tokens), uniform, 0, max_query_len=max(tokens))
        return found.cg_mode.name, found.num_tokens

    return dispatch


def v1_dispatcher(query: int) -> Dispatch:
    """The dispatcher of the V1 runner that captures decoding steps of ``query`` tokens per request."""
    from vllm.config.compilation import CompilationConfig, CUDAGraphMode
    from vllm.v1.cudagraph_dispatcher import CudagraphDispatcher

    config = CompilationConfig(
        cudagraph_capture_sizes=list(CAPTURE_SIZES), max_cudagraph_capture_size=CAPTURE_SIZES[-1]
    )
    config.cudagraph_capture_sizes = list(CAPTURE_SIZES)
    config.max_cudagraph_capture_size = CAPTURE_SIZES[-1]
    config.adjust_cudagraph_sizes_for_spec_decode(query)
    config.compile_sizes = None
    dispatcher = CudagraphDispatcher.__new__(CudagraphDispatcher)
    dispatcher.vllm_config = SimpleNamespace(
        scheduler_config=SimpleNamespace(max_num_seqs=MAX_NUM_SEQS),
        lora_config=None,
        num_speculative_tokens=NUM_SPECULATIVE_TOKENS,
    )
    dispatcher.compilation_config = config
    dispatcher.uniform_decode_query_len = query
    dispatcher.specialize_lora_count = False
    dispatcher.cudagraph_keys = {CUDAGraphMode.PIECEWISE: set(), CUDAGraphMode.FULL: set()}
    dispatcher.keys_initialized = False
    dispatcher.initialize_cudagraph_keys(CUDAGraphMode.FULL_AND_PIECEWISE, query)

    def dispatch(drafts: Sequence[int]) -> tuple[str, int]:
        mode, descriptor = dispatcher.dispatch(
            num_tokens=sum(drafts) + len(drafts), uniform_decode=all(length + 1 == query for length in drafts)
        )
        return mode.name, descriptor.num_tokens

    return dispatch


def served(
    make_policy: Callable[[Callable[[], float]], Any], concurrency: int, acceptance: float
) -> tuple[float, list[tuple[int, ...]]]:
    """Tokens per second of a simulated GPU server with graphs, and the draft lengths of its steps."""
    from vllm_instant.tools.measure.simulator import RequestClass, roofline, simulate, steady

    plans: list[tuple[int, ...]] = []

    def recording(clock: Callable[[], float]) -> Any:
        policy = make_policy(clock)
        plan = policy.get_num_draft_tokens

        def get_num_draft_tokens(step: Any) -> Any:
            lengths = plan(step)
            plans.append(tuple(map(int, lengths)))
            return lengths

        policy.get_num_draft_tokens = get_num_draft_tokens
        return policy

    report = simulate(
        recording,
        [RequestClass(steady(acceptance))],
        replace(roofline(8e9), graphs=graphs(), piecewise=PIECEWISE),
        concurrency=concurrency,
        requests=max(24, concurrency * 12),
        max_draft_tokens=NUM_SPECULATIVE_TOKENS,
    )
    return report.tokens / report.noiseless_seconds, [plan for plan in plans if plan]


def graphs() -> Any:
    """The steps that the V2 runner captures for a deployment."""
    from vllm_instant import FullGraphs
    from vllm_instant.patches.full_graphs import tiers

    return FullGraphs(tiers(NUM_SPECULATIVE_TOKENS), CAPTURE_SIZES[-1])


def simulated(dispatchers: dict[str, Dispatch]) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
    """By dispatcher and load the share of planned steps in FULL graphs; by load the regret.

    The regret is the share by which ``goodput`` is slower than the best fixed length, from a server's first step on.
    """
    from vllm_instant_plugins.goodput.policy import GoodputPolicy
    from vllm_instant_plugins.speculation import Fixed

    shares: dict[str, dict[str, float]] = {name: {} for name in dispatchers}
    regret = {}
    for concurrency, acceptance in itertools.product(CONCURRENCY, ACCEPTANCE):
        load = f"{concurrency} request{'s' * (concurrency > 1)}, acceptance {acceptance}"
        fixed = [
            served(lambda _, k=length: Fixed(k, None), concurrency, acceptance)[0]  # type: ignore[misc]
            for length in range(NUM_SPECULATIVE_TOKENS + 1)
        ]
        speed, plans = served(
            lambda clock: GoodputPolicy(NUM_SPECULATIVE_TOKENS, MAX_NUM_SEQS, clock=clock, graphs=graphs()),
            concurrency,
            acceptance,
        )
        regret[load] = round(1 - speed / max(fixed), 4)
        for name, dispatch in dispatchers.items():
            full = sum(dispatch(plan)[0] == "FULL" for plan in plans)
            shares[name][load] = round(full / len(plans), 3)
    return shares, regret


def main() -> None:
    """Print the dispatch of hand-written steps, and the share of the policy's plans that run in a FULL graph."""
    os.environ |= {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_PLUGINS": ""}
    from v2 import interpreter

    interpreter.offer()
    from vllm_instant.patches.full_graphs import table_of

    dispatchers = {
        "V2": v2_dispatcher(table_of(NUM_SPECULATIVE_TOKENS, MAX_NUM_SEQS)),
        "V2, vLLM alone": v2_dispatcher(None),
        "V1": v1_dispatcher(1 + NUM_SPECULATIVE_TOKENS),
        "V1, drafter on the host": v1_dispatcher(1),
    }
    steps = {
        name: {step: "{}, {} tokens".format(*dispatch(drafts)) for step, drafts in STEPS.items()}
        for name, dispatch in dispatchers.items()
    }
    shares, regret = simulated(dispatchers)
    print(json.dumps({"steps": steps, "full_share": shares, "regret": regret}))


if __name__ == "__main__":
    main()
