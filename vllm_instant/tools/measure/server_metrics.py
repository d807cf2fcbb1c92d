"""Names of vLLM's metrics, and what ``/metrics`` says as numbers."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

RUNNING, WAITING = "vllm:num_requests_running", "vllm:num_requests_waiting"
KV_USAGE = "vllm:kv_cache_usage_perc"
PREEMPTIONS = "vllm:num_preemptions_total"
PROMPT_TOKENS, GENERATED = "vllm:prompt_tokens_total", "vllm:generation_tokens_total"
DRAFTS = "vllm:spec_decode_num_drafts_total"
DRAFTED, ACCEPTED = "vllm:spec_decode_num_draft_tokens_total", "vllm:spec_decode_num_accepted_tokens_total"
STEPS, STEP_TOKENS = "vllm:iteration_tokens_total_count", "vllm:iteration_tokens_total_sum"
QUEUE_SECONDS, QUEUED = "vllm:request_queue_time_seconds_sum", "vllm:request_queue_time_seconds_count"
PREFIX_HITS, PREFIX_QUERIES = "vllm:prefix_cache_hits_total", "vllm:prefix_cache_queries_total"
CACHE_CONFIG = "vllm:cache_config_info"
SPECULATION_PREFIX = "vllm:spec_decode"


def metric_totals(text: str, prefixes: tuple[str, ...] = ("",)) -> dict[str, float]:
    """The samples of a ``/metrics`` page, summed over labels, by name; without buckets and creation times.

    Args:
        text: the page.
        prefixes: of the metrics' names; others are left out.

    """
    totals: dict[str, float] = {}
    # The parser is slow where there are many buckets, and nothing here reads them.
    lines = [line for line in text.splitlines() if line.startswith(prefixes) and "_bucket{" not in line]
    for family in text_string_to_metric_families("\n".join([*lines, ""])):
        for sample in family.samples:
            if not sample.name.endswith("_created"):
                totals[sample.name] = totals.get(sample.name, 0.0) + sample.value
    return totals
