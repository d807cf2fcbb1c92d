import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_instant.tools.moe import budgets


@st.composite
def batches(draw):
    experts = draw(st.integers(2, 24))
    tokens = draw(st.integers(1, 12))
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    logits = generator.normal(size=(tokens, experts)).astype(np.float32) * draw(st.sampled_from([0.3, 1.0, 4.0]))
    top_k = draw(st.integers(1, experts))
    keep = draw(st.integers(0, top_k))
    budget = draw(st.integers(0, experts))
    prior = generator.uniform(0.5, 2.0, experts)
    cluster = generator.integers(0, draw(st.integers(1, 6)), experts)
    padding = generator.random(tokens) < draw(st.sampled_from([0.0, 0.3]))
    return logits, top_k, keep, budget, prior, padding, cluster


def chosen(batch, cohesion=0.5):
    logits, top_k, keep, budget, prior, padding, cluster = batch
    return budgets.select_experts(logits, top_k, keep, budget, prior, padding, cluster=cluster, cohesion=cohesion)


@settings(deadline=None)
@given(batches())
def test_no_token_is_refused_its_protected_experts(batch):
    logits, _, keep, _, _, padding, _ = batch
    own = np.argsort(-logits, axis=-1)[:, :keep][~padding]
    assert chosen(batch).experts[own].all()


@settings(deadline=None)
@given(batches())
def test_the_number_of_experts_is_the_budget_unless_more_are_protected(batch):
    logits, top_k, keep, budget, _, padding, _ = batch
    union = len(np.unique(np.argsort(-logits, axis=-1)[:, :keep][~padding])) if keep else 0
    assert chosen(batch).experts.sum() == max(budget, top_k, union)


@settings(deadline=None)
@given(batches(), st.integers(0, 2**32 - 1))
def test_the_order_of_tokens_and_experts_does_not_matter(batch, seed):
    logits, top_k, keep, budget, prior, padding, cluster = batch
    generator = np.random.default_rng(seed)
    rows, columns = generator.permutation(logits.shape[0]), generator.permutation(logits.shape[1])
    # Experts without demand are tied; ties are broken by position.
    wanted = chosen(batch).demand > 0
    moved = (logits[rows][:, columns], top_k, keep, budget, prior[columns], padding[rows], cluster[columns])
    same = chosen(moved).experts == chosen(batch).experts[columns]
    assert same[wanted[columns]].all()


@settings(deadline=None)
@given(batches())
def test_a_budget_of_all_experts_changes_nothing(batch):
    logits, top_k, _, _, _, _, _ = batch
    every = budgets.select_experts(logits, top_k, 1, logits.shape[1])
    native = budgets.route(logits, top_k, np.ones(logits.shape[1], bool))
    restricted = budgets.route(logits, top_k, every.experts)
    assert all(np.array_equal(a, b) for a, b in zip(native, restricted, strict=True))


@settings(deadline=None)
@given(batches(), st.integers(0, 2**32 - 1))
def test_padding_rows_have_no_influence(batch, seed):
    logits, top_k, keep, budget, prior, padding, cluster = batch
    other = logits.copy()
    other[padding] = np.random.default_rng(seed).normal(size=logits.shape)[padding] * 100
    moved = (other, top_k, keep, budget, prior, padding, cluster)
    assert np.array_equal(chosen(moved).experts, chosen(batch).experts)


def test_unprotected_experts_are_ranked_by_the_demand_of_the_batch():
    logits = np.log([[0.5, 0.3, 0.2, 1e-9], [0.1, 1e-9, 0.3, 0.6]]).astype(np.float32)
    found = budgets.select_experts(logits, top_k=2, keep=1, budget=3)
    # 0 and 3 are kept; 1 and 2 are each the second choice of one token, with equal mass but for rounding.
    assert found.protected.tolist() == [True, False, False, True]
    preferred = budgets.select_experts(logits, 2, 1, 3, prior=np.array([1.0, 1.0, 2.0, 1.0]))
    assert preferred.experts.tolist() == [True, False, True, True]
    other = budgets.select_experts(logits, 2, 1, 3, prior=np.array([1.0, 2.0, 1.0, 1.0]))
    assert other.experts.tolist() == [True, True, False, True]


def test_cohesion_prefers_experts_of_busy_clusters():
    logits = np.log([[0.50, 0.24, 0.26, 1e-9]]).astype(np.float32)
    alone = budgets.select_experts(np.repeat(logits, 2, 0), top_k=3, keep=1, budget=0)
    assert alone.experts.sum() == 3
    by_mass = budgets.select_experts(np.array([[3.0, 1.0, 1.1, 0.0]], np.float32), 1, 0, 0)
    assert by_mass.experts.tolist() == [True, False, False, False]
    mass = np.array([[0.5, 0.24, 0.26]])
    cluster = np.array([0, 0, 1])
    scores = mass.astype(np.float32)
    # Of two, one is given: the expert in the cluster that has three quarters of the demand beats a slightly larger one.
    two = [np.repeat(x, 2, 0) for x in (scores, mass)]
    plain = budgets.select_experts(two[0], 3, 0, 3, mass=two[1], cluster=cluster)
    drawn = budgets.select_experts(two[0], 3, 0, 3, mass=two[1], cluster=cluster, cohesion=1.0)
    assert np.argsort(-plain.demand).tolist() == [0, 2, 1]
    assert np.argsort(-drawn.demand).tolist() == [0, 1, 2]


def test_hard_clusters_take_more_when_one_has_too_few_experts():
    logits = np.array([[3.0, 2.0, 1.0, 0.0]], np.float32)
    cluster = np.array([0, 1, 0, 1])
    assert budgets.select_clusters(logits, 2, 1, cluster).experts.tolist() == [True, False, True, False]
    assert budgets.select_clusters(logits, 3, 1, cluster).experts.all()


def test_kept_mass_includes_the_replacement_of_a_refused_pick():
    logits = np.log([[0.5, 0.3, 0.2]]).astype(np.float32)
    assert budgets.kept_mass(logits, 2, np.array([True, True, True])) == pytest.approx(1.0)
    assert budgets.kept_mass(logits, 2, np.array([True, False, True])) == pytest.approx(0.7 / 0.8)


def test_several_batches_at_once_equal_the_batches_one_by_one():
    generator = np.random.default_rng(0)
    logits = generator.normal(size=(3, 5, 8)).astype(np.float32)
    cluster = np.arange(8) // 3
    together = budgets.select_experts(logits, 3, 1, 4, cluster=cluster, cohesion=1.0)
    hard = budgets.select_clusters(logits, 3, 1, cluster)
    for index, batch in enumerate(logits):
        alone = budgets.select_experts(batch, 3, 1, 4, cluster=cluster, cohesion=1.0)
        assert np.array_equal(together.experts[index], alone.experts)
        assert np.array_equal(hard.experts[index], budgets.select_clusters(batch, 3, 1, cluster).experts)
        chosen_together = budgets.route(logits, 3, together.experts)[0][index]
        assert np.array_equal(chosen_together, budgets.route(batch, 3, alone.experts)[0])
