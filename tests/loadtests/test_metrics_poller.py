from __future__ import annotations

from vllm_instant.tools.measure.server_metrics import metric_totals
from vllm_instant_loadtests.metrics_poller import PREFIXES, DecisionPlacement

METRICS = """\
# HELP vllm:num_requests_running Number of requests.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="demo {x} 7"} 3.0
vllm:num_requests_running{engine="1",model_name="demo"} 2.0
vllm:inter_token_latency_seconds_bucket{le="0.01"} 5.0
vllm:inter_token_latency_seconds_count{engine="0"} 9.0
vllm:inter_token_latency_seconds_sum{engine="0"} 0.5
vllm:inter_token_latency_seconds_created{engine="0"} 1.7e9
vllm_instant:draft_tokens_accepted_total{engine="0"} 4e+02
python_gc_objects_collected_total{generation="0"} 8000.0
process_cpu_seconds_total 12.5
"""


def test_metrics_are_summed_over_labels_without_buckets():
    assert metric_totals(METRICS, PREFIXES) == {
        "vllm:num_requests_running": 5.0,
        "vllm:inter_token_latency_seconds_count": 9.0,
        "vllm:inter_token_latency_seconds_sum": 0.5,
        "vllm_instant:draft_tokens_accepted_total": 400.0,
        "process_cpu_seconds_total": 12.5,
    }


def answer(*steps):
    decisions = [{"step": step, "outcome": {"milliseconds": took} if took else None} for step, took in steps]
    return {"engines": [{"engine": 0, "decisions": decisions}]}


def test_decisions_are_placed_backwards_from_their_reading():
    placing = DecisionPlacement()
    first = placing.place(answer((1, 20.0), (2, 30.0), (3, None)), at=10.0)
    assert [(round(at, 3), decision["step"]) for at, decision in first] == [(9.97, 1), (10.0, 2)]
    second = placing.place(answer((2, 30.0), (3, 400.0), (4, 900.0)), at=11.0)
    assert [(round(at, 3), decision["step"]) for at, decision in second] == [(10.1, 3), (11.0, 4)]


def test_no_decision_is_placed_before_the_reading_that_did_not_have_it():
    placing = DecisionPlacement()
    placing.place(answer((1, 20.0)), at=10.0)
    assert [at for at, _ in placing.place(answer((2, 900.0), (3, 900.0), (4, 900.0)), at=11.0)] == [10.0, 10.1, 11.0]


def test_a_restarted_engine_begins_with_step_zero():
    placing = DecisionPlacement()
    placing.place(answer((50, 20.0)), at=10.0)
    assert [decision["step"] for _, decision in placing.place(answer((1, 20.0)), at=11.0)] == [1]
