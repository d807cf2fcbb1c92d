"""Greedy drafts of a Hugging Face model with cut, shared and dropped KV caches."""

import numpy as np
import pytest

from vllm_instant.tools.draft_server import model as module
from vllm_instant.tools.draft_server.model import CachedSequence, CachePool, TransformersModel, common_prefix


@pytest.fixture(scope="module")
def drafting(demo_pair):
    return TransformersModel(str(demo_pair.draft), "float32")


def sequence(*tokens):
    return np.array(tokens, np.int32)


def fresh(drafting, tokens, count=4):
    """Drafts without any cache."""
    guesses = drafting.draft(object(), object(), tokens, count, drafting.vocab_size)
    assert len(guesses) == count
    return [guess.token for guess in guesses]


def test_drafts_are_those_of_the_whole_text_whatever_was_cached(drafting):
    chance = np.random.default_rng(0)
    text = chance.integers(1, 400, 30).astype(np.int32)
    for _ in range(6):
        cut = int(chance.integers(1, len(text)))
        text = np.concatenate([text[:cut], chance.integers(1, 400, 5).astype(np.int32)])
        guesses = drafting.draft("request", "owner", text, 3, drafting.vocab_size)
        assert [guess.token for guess in guesses] == fresh(drafting, text, 3)
        assert all(1 >= guess.probability >= guess.other_probability > 0 for guess in guesses)
        assert all(guess.token != guess.other for guess in guesses)


def test_a_long_prompt_is_read_in_several_calls(drafting, monkeypatch):
    monkeypatch.setattr(module, "PREFILL_TOKENS", 8)
    tokens = np.arange(1, 21, dtype=np.int32)
    calls = [drafting.draft("long", "owner", tokens, 2, drafting.vocab_size) for _ in range(3)]
    assert calls[:2] == [[], []]
    monkeypatch.undo()
    assert [guess.token for guess in calls[2]] == fresh(drafting, tokens, 2)


def test_only_tokens_of_the_engines_vocabulary_are_proposed(drafting):
    assert max(fresh(drafting, sequence(1, 2, 3))) >= 50
    guesses = drafting.draft("small", "owner", sequence(1, 2, 3), 4, 50)
    assert max(max(guess.token, guess.other) for guess in guesses) < 50


def test_a_request_ends_at_the_models_length(drafting, monkeypatch):
    monkeypatch.setattr(drafting, "max_tokens", 6)
    assert len(drafting.draft("end", "owner", sequence(1, 2, 3), 9, 100)) == 3


def test_caches_of_ended_requests_begin_others_of_the_same_owner():
    pool = CachePool(100)
    one = pool.of("a", "tenant", sequence(1, 2, 3))
    one.tokens = sequence(1, 2, 3, 4)
    pool.release("a")
    assert pool.of("b", "stranger", sequence(1, 2, 3)) is not one
    assert pool.of("c", "tenant", sequence(9, 2, 3)) is not one
    assert pool.of("d", "tenant", sequence(1, 2, 7)) is one
    assert pool.of("d", "tenant", sequence(5)) is one


def test_the_least_recently_used_cache_is_dropped_first():
    pool = CachePool(10)
    for name in "abc":
        pool.of(name, "owner", sequence(1)).tokens = np.zeros(4, np.int32)
    pool.of("a", "owner", sequence(1))
    pool.shrink()
    assert (pool.num_tokens, pool.num_evicted) == (8, 1)
    assert isinstance(pool.of("b", "owner", sequence(1)), CachedSequence)
    assert len(pool.of("b", "owner", sequence(1)).tokens) == 0
    pool.release("c")
    pool.of("b", "owner", sequence(1)).tokens = np.zeros(40, np.int32)
    pool.shrink()
    # The newest one stays, whatever its size.
    assert pool.num_tokens == 40


def test_common_prefixes():
    assert common_prefix(sequence(1, 2, 3), sequence(1, 2, 4)) == 2
    assert common_prefix(sequence(1, 2), sequence(1, 2, 4)) == 2
    assert common_prefix(sequence(), sequence(1)) == 0


def test_a_model_that_is_not_there_is_one_sentence(tmp_path):
    with pytest.raises(ValueError, match="cannot be loaded"):
        TransformersModel(str(tmp_path / "nothing"))


def test_recurrent_layers_are_refused(tmp_path):
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(vocab_size=64, hidden_size=16, state_size=4, num_hidden_layers=1)
    MambaForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has a cache that cannot be cut"):
        TransformersModel(str(tmp_path))
