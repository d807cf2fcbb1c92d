"""Pinned prefixes with a pool that counts references."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_instant.scheduling.pinned_prefixes import PinnedPrefixes

SIZE = 4


class Pool:
    def __init__(self):
        self.references = Counter()
        self.freed = []

    def touch(self, blocks):
        self.references.update(blocks)

    def free_blocks(self, blocks):
        blocks = list(blocks)
        self.freed += blocks
        self.references.subtract(blocks)
        assert min(self.references.values()) >= 0, "freed more often than touched"


@pytest.fixture
def pool():
    return Pool()


@pytest.fixture
def pinned(pool):
    found = PinnedPrefixes(pool, [SIZE], num_blocks=100)
    assert found.open("a", max_sessions=2, max_tokens=20)
    return found


def ids(count, first=0):
    return list(range(first, first + count))


def test_the_next_request_finds_the_pinned_tokens(pinned, pool):
    pinned.pin("a", ids(10), [ids(3)], "key", 1.0)
    assert pinned.find("a", ids(30), "key") == (10, ([0, 1, 2],))
    assert pool.references == Counter(ids(3))


def test_the_last_token_is_always_left_to_compute(pinned):
    pinned.pin("a", ids(10), [ids(3)], None, 1.0)
    assert pinned.find("a", ids(10), None) == (9, ([0, 1, 2],))
    assert pinned.find("a", ids(9), None) == (8, ([0, 1],))


def test_only_the_common_prefix_is_used(pinned):
    pinned.pin("a", ids(10), [ids(3)], None, 1.0)
    assert pinned.find("a", [*ids(5), 99, 99, 99], None) == (5, ([0, 1],))
    assert pinned.find("a", [99] * 9, None) == (0, ([],))


def test_other_keys_and_other_names_find_nothing(pinned):
    pinned.pin("a", ids(10), [ids(3)], ("lora", "salt"), 1.0)
    assert pinned.find("a", ids(30), ("lora", "other salt")) == (0, ())
    assert pinned.find("b", ids(30), ("lora", "salt")) == (0, ())
    pinned.pin("b", ids(10), [ids(3)], None, 1.0)
    assert pinned.num_blocks == 3, "b is not open"


def test_at_most_max_tokens_are_pinned(pinned):
    pinned.pin("a", ids(40), [ids(10)], None, 1.0)
    assert pinned.find("a", ids(50), None) == (20, (ids(5),))
    assert pinned.num_blocks == 5


def test_at_most_max_sessions_are_open(pinned):
    assert pinned.open("b", max_sessions=2, max_tokens=20)
    assert not pinned.open("c", max_sessions=2, max_tokens=20)
    assert pinned.open("a", max_sessions=2, max_tokens=20), "it is one of them"
    pinned.unpin("a")
    assert pinned.open("c", max_sessions=2, max_tokens=20)


def test_at_most_the_share_of_the_cache_is_pinned(pinned, pool):
    pinned.open("b", max_sessions=2, max_tokens=20)
    pinned.pin("a", ids(12), [ids(3)], None, 0.05)
    pinned.pin("b", ids(12), [ids(3, 10)], None, 0.05)
    assert pinned.num_blocks == 3, "the older one went"
    assert pinned.find("a", ids(20), None)[0] == 0
    pinned.pin("b", ids(20), [ids(6, 20)], None, 0.04)
    assert pinned.num_blocks == 0, "alone it would be too much"
    assert not +pool.references


def test_the_least_recently_used_prefix_is_evicted_first(pinned, pool):
    pinned.open("b", max_sessions=2, max_tokens=20)
    pinned.pin("a", ids(8), [ids(2)], None, 1.0)
    pinned.pin("b", ids(8), [ids(2, 10)], None, 1.0)
    pinned.find("a", ids(9), None)
    assert pinned.evict_lru()
    assert pool.freed == [11, 10], "the end first"
    assert pinned.evict_lru()
    assert not pinned.evict_lru()
    assert pinned.find("a", ids(9), None)[0] == 0
    assert len(pinned) == 2, "both may hold again"


def test_replaced_blocks_are_released_only_if_they_are_not_pinned_again(pinned, pool):
    pinned.pin("a", ids(8), [ids(2)], None, 1.0)
    pinned.pin("a", ids(12), [ids(3)], None, 1.0)
    assert +pool.references == Counter(ids(3))


def test_several_groups_of_layers(pool):
    pinned = PinnedPrefixes(pool, [4, 8], num_blocks=100)
    pinned.open("a", max_sessions=1, max_tokens=100)
    pinned.pin("a", ids(10), [ids(3), ids(2, 50)], None, 1.0)
    assert pinned.find("a", [*ids(7), 99, 99], None) == (7, ([0, 1], [50]))


ACTIONS = st.lists(
    st.tuples(
        st.sampled_from(["open", "close", "keep", "find", "give back", "clear"]),
        st.sampled_from("abcd"),
        st.integers(1, 60),
    ),
    max_size=40,
)


@given(ACTIONS)
def test_every_block_is_released_exactly_once(actions):
    pool = Pool()
    pinned = PinnedPrefixes(pool, [SIZE], num_blocks=30)
    for action, name, number in actions:
        if action == "open":
            pinned.open(name, max_sessions=3, max_tokens=40)
        elif action == "close":
            pinned.unpin(name)
        elif action == "keep":
            first = 100 * number
            pinned.pin(name, ids(number), [ids(-(-number // SIZE) + 1, first)], None, 0.5)
        elif action == "find":
            tokens, groups = pinned.find(name, ids(number), None)
            assert tokens < number
            assert all(len(group) == -(-tokens // SIZE) for group in groups)
        elif action == "give back":
            pinned.evict_lru()
        else:
            pinned.clear()
        assert pinned.num_blocks == sum(pool.references.values()) <= 15
        assert len(pinned) <= 3
    for name in "abcd":
        pinned.unpin(name)
    assert not +pool.references
