import numpy as np
import pytest
from expert_traces import planted
from sklearn.metrics import adjusted_rand_score

from vllm_instant.moe.routing_trace import TraceError
from vllm_instant.tools.moe import expert_grouping
from vllm_instant.tools.moe.grouping import balanced_groups


def test_planted_clusters_and_their_number_are_found():
    trace, truth = planted()
    found, evaluation = expert_grouping.learn(trace)
    assert found.clusters == (4, 4)
    for labels, group in zip(found.cluster, truth, strict=True):
        assert adjusted_rand_score(labels, group) == pytest.approx(1.0)
    assert evaluation.structured
    assert evaluation.together.low > 2
    assert evaluation.stability > 0.9
    assert "picked together" in evaluation.summary()


def test_pairs_are_counted_in_every_part_of_a_long_trace(monkeypatch):
    trace, _ = planted(requests=8)
    whole = expert_grouping.co_activation(trace)
    use = np.zeros((len(trace), 32))
    np.put_along_axis(use, trace.experts[:, 1].astype(np.int64), 1.0, axis=1)
    assert np.array_equal(whole[1], use.T @ use)
    monkeypatch.setattr(expert_grouping, "ROWS_PER_PART", 100)
    assert np.array_equal(expert_grouping.co_activation(trace), whole)


def test_random_routing_is_reported_as_without_structure():
    trace, _ = planted(loyalty=0.25)
    _, evaluation = expert_grouping.learn(trace, clusters=4)
    assert not evaluation.structured
    assert evaluation.together.low < 1.02
    assert "no structure" in evaluation.summary()


def test_popular_experts_alone_are_no_structure():
    # Every token chooses independently, but some experts are chosen far more often than others.
    trace, _ = planted(loyalty=0.25)
    generator = np.random.default_rng(1)
    odds = np.log(np.repeat([8.0, 1.0], 16))
    keys = odds + generator.gumbel(size=(len(trace), 2, 32))
    trace.experts[:] = np.argsort(-keys, -1)[..., :4]
    _, evaluation = expert_grouping.learn(trace, clusters=4)
    assert not evaluation.structured


def test_the_affinity_differs_by_prompt_class():
    trace, truth = planted()
    found, _ = expert_grouping.learn(trace, clusters=4)
    for layer in range(2):
        group = {found.cluster[layer][expert]: truth[layer][expert] for expert in range(32)}
        even = found.affinity["even"][layer]
        assert sum(even) == pytest.approx(1.0)
        assert sum(share for cluster, share in enumerate(even) if group[cluster] < 2) > 0.8
    assert expert_grouping.class_distance(found.affinity) > 0.5


def test_experts_that_weigh_more_have_a_larger_prior():
    trace, _ = planted(loyalty=0.25)
    trace.weights[trace.experts == 3] = 0.75
    trace.experts[trace.experts == 5] = 6
    prior = expert_grouping.strength(trace)
    assert (prior[:, 3] == 2.0).all()
    # An expert that was never picked has the mean.
    assert prior[:, [0, 5]] == pytest.approx(1.0, abs=0.08)
    assert expert_grouping.learn(trace, clusters=4)[0].prior[0][3] == 2.0


def test_too_few_requests_or_too_many_clusters_are_refused():
    with pytest.raises(TraceError, match="5 requests are too few to learn from: at least 8"):
        expert_grouping.learn(planted(requests=5)[0])
    with pytest.raises(TraceError, match="40 clusters of 32 experts: valid are 1 to 32"):
        expert_grouping.learn(planted()[0], clusters=40)


@pytest.mark.parametrize(("things", "groups"), [(12, 3), (13, 3), (5, 5), (7, 1)])
def test_groups_are_balanced_and_numbered_by_their_smallest_member(things, groups):
    affinity = np.random.default_rng(0).random((things, things))
    labels = balanced_groups(affinity + affinity.T, groups)
    sizes = np.bincount(labels)
    assert len(sizes) == groups
    assert sizes.max() - sizes.min() <= 1
    assert labels[0] == 0
    with pytest.raises(ValueError, match="cannot be partitioned into"):
        balanced_groups(affinity, things + 1)
