import json
from dataclasses import replace

import numpy as np
import pytest

from vllm_instant.moe.expert_groups import ClusterError, SuperExperts, one_cluster
from vllm_instant.moe.routing_trace import RoutedModel, Trace, TraceError

MODEL = RoutedModel("toy", layers=2, experts=6, top_k=2)


def trace(tokens=20, classes=("code", "chat"), requests=5, model=MODEL, seed=0):
    generator = np.random.default_rng(seed)
    experts = np.argsort(generator.random((tokens, model.layers, model.experts)), -1)[..., : model.top_k]
    return Trace(
        model,
        experts.astype(np.int16),
        np.full(experts.shape, 1 / model.top_k, np.float16),
        np.sort(generator.integers(0, requests, tokens)).astype(np.int32),
        np.arange(tokens, dtype=np.int64) + 100,
        np.arange(tokens) % 4 == 0,
        (np.arange(requests) % len(classes)).astype(np.int16),
        classes,
    )


def test_a_trace_reads_as_it_was_written(tmp_path):
    written = trace()
    written.write(tmp_path / "deep" / "a.npz")
    found = Trace.read(tmp_path / "deep" / "a.npz")
    assert found.model == MODEL
    assert found.classes == written.classes
    for name in ("experts", "weights", "request", "step", "is_prefill", "class_of_request"):
        assert np.array_equal(getattr(found, name), getattr(written, name))


def test_merging_keeps_requests_steps_and_classes_apart():
    first, second = trace(classes=("code", "chat")), trace(classes=("chat", "maths"), seed=1)
    both = Trace.merge([first, second])
    assert len(both) == 40
    assert both.classes == ("code", "chat", "maths")
    assert not set(both.request[:20]) & set(both.request[20:])
    assert not set(both.step[:20]) & set(both.step[20:])
    names = np.array(both.classes)[both.prompt_group[20:]]
    assert np.array_equal(names, np.array(second.classes)[second.prompt_group])


def test_a_split_shares_no_request_and_takes_from_every_class():
    first, second = trace(tokens=400, requests=20).split(0.5)
    assert not set(first.request) & set(second.request)
    assert len(first.requests) == len(second.requests) == 10
    assert set(first.prompt_group) == set(second.prompt_group) == {0, 1}


def test_decode_leaves_prompts_out():
    assert len(trace().decode()) == 15
    assert not trace().decode().is_prefill.any()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"experts": np.zeros((20, 2, 3), np.int16)}, r"experts as int16 \[20, 2, 3\], expected int16 \[20, 2, 2\]"),
        ({"experts": np.full((20, 2, 2), 6, np.int16)}, "experts from 6 to 6, valid are 0 to 5"),
        ({"step": np.zeros(20, np.int32)}, "step as int32"),
        ({"request": np.full(20, 9, np.int32)}, "request from 9 to 9, valid are 0 to 4"),
        ({"classes": ("code",)}, "names 1 prompt classes, but uses number 1"),
    ],
)
def test_what_cannot_be_is_refused_in_one_sentence(change, said):
    with pytest.raises(TraceError, match=said):
        replace(trace(), **change)


def test_files_that_are_no_traces(tmp_path):
    with pytest.raises(TraceError, match="there is no trace"):
        Trace.read(tmp_path / "none.npz")
    (tmp_path / "text.npz").write_text("hello")
    with pytest.raises(TraceError, match="not an expert trace"):
        Trace.read(tmp_path / "text.npz")
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    with pytest.raises(TraceError, match="has no meta"):
        Trace.read(tmp_path / "other.npz")
    with pytest.raises(TraceError, match="different models: toy"):
        Trace.merge([trace(), trace(model=RoutedModel("big", 2, 8, 2))])
    with pytest.raises(TraceError, match="no trace"):
        Trace.merge([])


def clusters(**change):
    values = {
        "model": MODEL,
        "cluster": ((0, 0, 0, 1, 1, 1), (0, 1, 2, 0, 1, 2)),
        "prior": ((1.0,) * 6, (0.5, 1.5, 1.0, 1.0, 1.0, 1.0)),
        "affinity": {"code": ((0.75, 0.25), (0.5, 0.25, 0.25))},
        "placement": {2: ((0, 0, 0, 1, 1, 1), (0, 1, 0, 1, 0, 1))},
        "learned_from": {"tokens": 20},
    }
    return SuperExperts(**(values | change))


def test_clusters_read_as_they_were_written(tmp_path):
    path = tmp_path / "clusters.json"
    clusters().write(path)
    assert SuperExperts.read(path) == clusters()
    assert "[0, 1, 2, 0, 1, 2]" in path.read_text()  # a layer is one line
    assert clusters().clusters == (2, 3)
    assert one_cluster(MODEL).clusters == (1, 1)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"cluster": ((0, 0, 0, 1, 1, 1),)}, "cluster has 1 layers of 6 experts, the model has 2 of 6"),
        ({"cluster": ((0, 0, 0, 2, 2, 2), (0, 1, 2, 0, 1, 2))}, "layer 0: numbers from 0 to 1 without gaps"),
        ({"prior": ((1.0,) * 6, (0.0,) + (1.0,) * 5)}, "prior, layer 1: positive numbers"),
        ({"affinity": {"code": ((1.0,), (1.0,))}}, "affinity of 'code'"),
        ({"placement": {2: ((0, 0, 0, 1, 1, 2), (0,) * 6)}}, "names device 2"),
    ],
)
def test_clusters_that_cannot_be_are_refused(change, said):
    with pytest.raises(ClusterError, match=said):
        clusters(**change)


def test_cluster_files_that_cannot_be_used(tmp_path):
    path = tmp_path / "clusters.json"
    with pytest.raises(ClusterError, match="there is no cluster file"):
        SuperExperts.read(path)
    path.write_text("{")
    with pytest.raises(ClusterError, match="line 1: not JSON"):
        SuperExperts.read(path)
    path.write_text("[]")
    with pytest.raises(ClusterError, match="cluster format list"):
        SuperExperts.read(path)
    clusters().write(path)
    record = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in record.items() if key != "prior"}))
    with pytest.raises(ClusterError, match="prior: field required"):
        SuperExperts.read(path)
    path.write_text(json.dumps(record | {"cluster": [[0.5] * 6] * 2}))
    with pytest.raises(ClusterError, match=r"cluster.0.0: input should be a valid integer"):
        SuperExperts.read(path)
    with pytest.raises(ClusterError, match=r"learned for toy .2 layers of 6 experts.* but big with 2 layers of 8"):
        clusters().require(RoutedModel("big", 2, 8, 2))
