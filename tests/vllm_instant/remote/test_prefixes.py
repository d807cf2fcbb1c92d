"""Prefixes that both ends know: what is found is what was sent, and no more than may be kept."""

from hypothesis import given
from hypothesis import strategies as st

from vllm_instant.remote.prefixes import BLOCK_TOKENS, KnownPrefixes, PrefixStore, block_hashes

BLOCKS = st.lists(st.integers(0, 2), max_size=6)
"""Texts of whole blocks, of which many begin alike."""


def _tokens(blocks):
    return [token for block in blocks for token in [block] * BLOCK_TOKENS]


def test_hashes_name_whole_blocks_with_all_before_them():
    tokens = _tokens([1, 2, 1])
    hashes = block_hashes(tokens, "")
    assert len(set(hashes)) == 3
    assert block_hashes([*tokens, 5], "") == hashes
    assert block_hashes(tokens[:-1], "") == hashes[:2]
    assert block_hashes([0, *tokens[1:]], "")[1] != hashes[1]
    assert not set(hashes) & set(block_hashes(tokens, "another tenant"))


@given(st.lists(st.tuples(st.sampled_from("ab"), BLOCKS), max_size=20), st.integers(1, 12))
def test_a_store_returns_what_was_sent_or_nothing(sent, capacity):
    store = PrefixStore(capacity * BLOCK_TOKENS)
    owned = {"a": {}, "b": {}}
    for owner, blocks in sent:
        store.add(owner, "", [*_tokens(blocks), 7])
        assert len(store) <= capacity * BLOCK_TOKENS
        names = block_hashes(_tokens(blocks), "")
        owned[owner] |= {name: _tokens(blocks[: place + 1]) for place, name in enumerate(names)}
        if names and len(names) <= capacity:
            assert store.tokens_of(owner, names[-1]) == _tokens(blocks)
    for owner, prefixes in owned.items():
        for name in owned["a"] | owned["b"]:
            assert store.tokens_of(owner, name) in (None, prefixes.get(name))
    assert store.tokens_of("a", b"") == []


@given(st.lists(BLOCKS, max_size=20), BLOCKS, st.integers(1, 12))
def test_the_longest_known_prefix_is_found(sent, blocks, capacity):
    known, names = KnownPrefixes(capacity), block_hashes(_tokens(blocks), "")
    newest = []
    for one in sent:
        hashes = block_hashes(_tokens(one), "")
        known.add(hashes)
        newest = [name for name in newest if name not in hashes] + hashes
    newest = newest[-capacity:]
    length = known.longest(names)
    assert length == max((place + 1 for place, name in enumerate(names) if name in newest), default=0)
    known.clear()
    assert known.longest(names) == 0
