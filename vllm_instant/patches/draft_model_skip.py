"""Skip vLLM's own drafters in steps without drafts (V1 runner, synchronous scheduling).

With ``num_spec_tokens_to_schedule = 0`` vLLM still runs a draft model once per step, to keep its KV cache complete, and
an n-gram lookup in full. Here both are skipped. A draft model that runs again later first reads, in one forward pass,
the tokens that it has missed (``vllm_instant.speculation.draft_coverage`` tracks them). A long gap is read over several
steps, so that the step of the other requests stays short; its request gets no drafts until it is closed. A prompt is
such a gap: the draft model does not run in a step that reads prompts (``draft_budget``), because the engine hands out
the tokens of a step after the drafts were made, and a first token would come later by the draft model's work.

EAGLE heads and MTP layers read the target's hidden states, which are gone after a step: they keep vLLM's one pass per
step. So do drafters under asynchronous scheduling, where sampled tokens stay on the device.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from vllm_instant.patches.compat import HasAttribute, HasSignature, References, VllmPatch
from vllm_instant.patches.names import MODEL_RUNNER, PLAN_ATTRIBUTE
from vllm_instant.speculation.draft_coverage import MAX_CATCH_UP_TOKENS, DraftCoverage

_ATTRIBUTE = "instant_draft_model"
"""On a model runner: its ``DraftModelCatchUp``."""


class DraftModelCatchUp:
    """Runs one worker's draft model in steps with drafts, and keeps its KV cache complete.

    Args:
        runner: vLLM's ``GPUModelRunner``.

    """

    def __init__(self, runner: Any) -> None:
        self.runner = runner
        self.drafter = runner.drafter
        self.coverage = DraftCoverage(self.drafter.block_size)
        self.read_tokens = 0
        """Missed tokens that the draft model read in the newest step."""
        self._rows_of_step: list[tuple[int, int, int]] | None = None
        """What ``missed`` found, for the ``propose`` of the same step."""

    def missed(self, scheduler_output: Any) -> list[int]:
        """Tokens before those of this step that the draft model has not read, by row of the batch.

        A caller that assigns work to the draft model asks first; ``propose`` must follow in the same step.
        """
        self._rows_of_step = self._rows(scheduler_output)
        return [start - covered for start, _, covered in self._rows_of_step]

    def _rows(self, scheduler_output: Any) -> list[tuple[int, int, int]]:
        """By row of the batch: where this step's tokens start and stop, and how far the draft model has read."""
        batch, coverage = self.runner.input_batch, self.coverage
        tables = self._tables()
        coverage.forget(scheduler_output.scheduled_cached_reqs.resumed_req_ids)
        rows = []
        for row in range(batch.num_reqs):
            request_id, start = batch.req_ids[row], int(batch.num_computed_tokens_cpu[row])
            stop = start + scheduler_output.num_scheduled_tokens[request_id]
            rows.append((start, stop, min(start, coverage.covered(request_id, start, tables[row]))))
        return rows

    def _tables(self) -> Any:
        """KV blocks of each row of the batch: int32 ``[max_num_seqs, max_blocks]``."""
        return self.runner.input_batch.block_table[self.drafter.kv_cache_gid].get_numpy_array()

    def propose(
        self, original: Any, scheduler_output: Any, lengths: Mapping[str, int], arguments: tuple[Any, ...]
    ) -> Any:
        """Drafts for the rows of the batch: a list of token ids per row, shortened to ``lengths``.

        Args:
            original: vLLM's ``propose_draft_token_ids`` of this runner.
            scheduler_output: the step.
            lengths: number of draft tokens by request id.
            arguments: of ``propose_draft_token_ids``, after ``scheduler_output``.

        """
        sampled_token_ids, common_attn_metadata = arguments[0], arguments[6]
        runner, coverage = self.runner, self.coverage
        batch = runner.input_batch
        rows = range(batch.num_reqs)
        request_ids = batch.req_ids
        tables = self._tables()
        known, self._rows_of_step = self._rows_of_step or self._rows(scheduler_output), None
        starts, stops, covered = ([of_row[part] for of_row in known] for part in range(3))
        wanted = [lengths.get(request_ids[row], 0) for row in rows]
        self.read_tokens = 0
        if not any(wanted):
            for row in rows:
                coverage.target_alone(request_ids[row], stops[row], tables[row])
            return [[] for _ in rows]

        gaps = [(row, covered[row], starts[row]) for row in rows if wanted[row] and covered[row] < starts[row]]
        chosen = _within_budget(gaps, min(MAX_CATCH_UP_TOKENS, self.drafter.max_num_tokens))
        if chosen:
            self._read(chosen, common_attn_metadata)
        for row, start, stop in chosen:
            self.read_tokens += stop - start
            coverage.draft_read(request_ids[row], stop, tables[row])
            covered[row] = stop

        drafts = original(scheduler_output, *arguments).tolist()
        # vLLM's sampled rows hold -1 behind the accepted tokens.
        valid = ((sampled_token_ids >= 0) & (sampled_token_ids < batch.vocab_size)).sum(1).tolist()
        discarded = runner.discard_request_mask.np
        scheduled_drafts = scheduler_output.scheduled_spec_decode_tokens
        for row in rows:
            request_id = request_ids[row]
            if covered[row] < starts[row]:
                # It ran in the batch, but over a gap in its KV cache: neither its draft nor its new keys are valid.
                coverage.target_alone(request_id, stops[row], tables[row])
                wanted[row] = 0
            elif discarded[row]:
                coverage.draft_read(request_id, stops[row], tables[row])
            else:
                rejected = len(scheduled_drafts.get(request_id, ())) + 1 - valid[row]
                coverage.draft_read(request_id, stops[row] - rejected + 1, tables[row])
        return [draft[:length] for draft, length in zip(drafts, wanted, strict=True)]

    def _read(self, gaps: list[tuple[int, int, int]], common_attn_metadata: Any) -> None:
        """Fill the draft model's KV cache over ``(row, start, stop)`` of missed tokens, in one forward pass."""
        import torch
        from vllm.v1.worker import gpu_model_runner

        drafter, batch = self.drafter, self.runner.input_batch
        device = self.runner.device
        token_ids = np.concatenate([batch.token_ids_cpu[row, start:stop] for row, start, stop in gaps])
        positions = torch.from_numpy(np.concatenate([np.arange(start, stop) for _, start, stop in gaps]))
        lengths = np.array([stop - start for _, start, stop in gaps], np.int32)
        ends = torch.tensor([stop for _, _, stop in gaps], dtype=torch.int32)
        query_start_loc = torch.zeros(len(lengths) + 1, dtype=torch.int32)
        query_start_loc[1:] = torch.from_numpy(lengths.cumsum())
        row_index = torch.tensor([row for row, _, _ in gaps], device=device)
        block_table = common_attn_metadata.block_table_tensor[row_index]
        positions = positions.to(device)
        of_request = torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths)).to(device)
        block = block_table[of_request, positions // drafter.block_size].to(torch.int64)
        slots = block * drafter.block_size + positions % drafter.block_size
        count = len(token_ids)
        metadata = replace(
            common_attn_metadata,
            query_start_loc=query_start_loc.to(device),
            query_start_loc_cpu=query_start_loc,
            seq_lens=ends.to(device=device, dtype=common_attn_metadata.seq_lens.dtype),
            seq_lens_cpu_upper_bound=ends,
            num_reqs=len(lengths),
            num_actual_tokens=count,
            max_query_len=int(lengths.max()),
            max_seq_len=int(ends.max()),
            block_table_tensor=block_table,
            slot_mapping=slots,
            positions=None,
            is_prefilling=None,
        )
        # Values that the metadata caches were computed from the batch that was replaced here.
        for name in ("_num_computed_tokens_cache", "_token_to_req_indices_cache", "_seq_lens_cpu"):
            if hasattr(metadata, name):
                setattr(metadata, name, None)
        _, per_layer = drafter.build_per_group_and_layer_attn_metadata(metadata)
        input_ids = torch.from_numpy(token_ids).to(device)
        if drafter.use_heterogeneous_vocab:
            input_ids = drafter.vocab_mapping.map_target_to_draft_ids(input_ids)
        drafter.input_ids[:count] = input_ids
        drafter.positions[:count] = positions
        with gpu_model_runner.set_forward_context(
            per_layer,
            drafter.vllm_config,
            num_tokens=count,
            slot_mapping=drafter._get_slot_mapping(count, slots),
        ):
            drafter.model(input_ids=drafter.input_ids[:count], positions=drafter.positions[:count], inputs_embeds=None)


def _within_budget(gaps: list[tuple[int, int, int]], budget: int) -> list[tuple[int, int, int]]:
    """``(row, start, stop)`` of the shortest gaps, the last one cut, at most ``budget`` tokens together."""
    chosen = []
    for row, start, stop in sorted(gaps, key=lambda gap: gap[2] - gap[1]):
        if budget <= 0:
            break
        stop = min(stop, start + budget)
        budget -= stop - start
        chosen.append((row, start, stop))
    return chosen


def can_be_skipped(runner: Any) -> bool:
    """Whether this runner's draft model can be skipped and can catch up later."""
    config, drafter = runner.speculative_config, runner.drafter
    parallel = runner.parallel_config
    return (
        config.method == "draft_model"
        and not config.disable_padded_drafter_batch
        and not drafter.parallel_drafting
        and not drafter.uses_mrope
        # Other ranks of these groups take part in each forward pass of the draft model.
        and parallel.data_parallel_size == 1
        and parallel.pipeline_parallel_size == 1
        and parallel.decode_context_parallel_size == 1
    )


def catch_up_of(runner: Any) -> DraftModelCatchUp:
    """The object that runs this runner's draft model, made on the first call."""
    catch_up = runner.__dict__.get(_ATTRIBUTE)
    if catch_up is None:
        catch_up = DraftModelCatchUp(runner)
        setattr(runner, _ATTRIBUTE, catch_up)
    return catch_up


def _propose(propose: Any, runner: Any, scheduler_output: Any, *arguments: Any) -> Any:
    plan = getattr(scheduler_output, PLAN_ATTRIBUTE, None)
    if plan is None or runner.use_async_scheduling:
        return propose(scheduler_output, *arguments)
    if runner.speculative_config.method == "ngram" and scheduler_output.num_spec_tokens_to_schedule == 0:
        return [[] for _ in range(runner.input_batch.num_reqs)]
    if can_be_skipped(runner):
        return catch_up_of(runner).propose(propose, scheduler_output, plan.num_draft_tokens, arguments)
    return propose(scheduler_output, *arguments)


def _update_states(update: Any, runner: Any, scheduler_output: Any) -> Any:
    """Forget finished requests here and not while drafting: an engine's last step has no tokens and drafts nothing."""
    catch_up = runner.__dict__.get(_ATTRIBUTE)
    if catch_up is not None:
        catch_up.coverage.forget(sorted(scheduler_output.finished_req_ids))
    return update(scheduler_output)


_RUNNER = "v1/worker/gpu_model_runner.py"
_PROPOSER = "v1/spec_decode/llm_base_proposer.py"

PATCH = VllmPatch(
    name="draft_model_skip",
    purpose="vLLM's own drafters do not run in steps without drafts",
    requirements=(
        HasSignature(
            _RUNNER,
            "GPUModelRunner.propose_draft_token_ids",
            (
                "self",
                "scheduler_output",
                "sampled_token_ids",
                "sampling_metadata",
                "hidden_states",
                "sample_hidden_states",
                "aux_hidden_states",
                "spec_decode_metadata",
                "common_attn_metadata",
            ),
        ),
        References(_RUNNER, "GPUModelRunner.sample_tokens", ("propose_draft_token_ids", "draft_after_bookkeeping")),
        HasSignature(_RUNNER, "GPUModelRunner._update_states", ("self", "scheduler_output"), exact=True),
        References(_RUNNER, "GPUModelRunner.execute_model", ("_update_states",)),
        References(_RUNNER, "GPUModelRunner._get_draft_token_ids_cpu", ("_draft_token_ids", "list")),
        References("v1/worker/gpu_input_batch.py", "InputBatch", ("num_computed_tokens_cpu", "token_ids_cpu")),
        HasSignature(_PROPOSER, "SpecDecodeBaseProposer.build_per_group_and_layer_attn_metadata", ("self",)),
        HasSignature(_PROPOSER, "SpecDecodeBaseProposer._get_slot_mapping", ("self", "num_tokens", "slot_mapping")),
        References(
            _PROPOSER,
            "SpecDecodeBaseProposer.__init__",
            ("kv_cache_gid", "block_size", "max_num_tokens", "input_ids", "positions", "parallel_drafting"),
        ),
        HasAttribute("v1/attention/backend.py", "CommonAttentionMetadata.block_table_tensor"),
        HasAttribute("v1/attention/backend.py", "CommonAttentionMetadata.seq_lens_cpu_upper_bound"),
        HasAttribute("v1/attention/backend.py", "CommonAttentionMetadata.slot_mapping"),
    ),
    slots=("speculation",),
    optional=True,
    wraps={
        f"{MODEL_RUNNER}:GPUModelRunner.propose_draft_token_ids": _propose,
        f"{MODEL_RUNNER}:GPUModelRunner._update_states": _update_states,
    },
)
