"""The tokens with valid draft KV, without a model."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_instant.speculation.draft_coverage import DraftCoverage

BLOCKS = np.array([7, 3, 9, 2000, 5], np.int32)


def test_a_new_request_has_no_draft_kv():
    assert DraftCoverage(4).covered("r", 0, BLOCKS) == 0


def test_coverage_continues_where_it_stopped():
    coverage = DraftCoverage(4)
    coverage.covered("r", 0, BLOCKS)
    coverage.draft_read("r", 6, BLOCKS)
    coverage.target_alone("r", 9, BLOCKS)
    assert coverage.covered("r", 9, BLOCKS) == 6
    coverage.draft_read("r", 10, BLOCKS)
    assert coverage.covered("r", 10, BLOCKS) == 10


def test_complete_blocks_are_shared_through_the_prefix_cache():
    coverage = DraftCoverage(4)
    coverage.covered("first", 0, BLOCKS)
    coverage.draft_read("first", 11, BLOCKS)
    coverage.forget(["first"])
    assert coverage.covered("second", 12, BLOCKS) == 8, "the third block was not complete"


def test_blocks_with_holes_are_not_shared():
    coverage = DraftCoverage(4)
    coverage.covered("first", 0, BLOCKS)
    coverage.draft_read("first", 16, BLOCKS)
    coverage.forget(["first"])
    # Another request gets two of the blocks, and the draft model is off meanwhile.
    coverage.covered("other", 0, BLOCKS[[0, 2]])
    coverage.target_alone("other", 2, BLOCKS[[0, 2]])
    assert coverage.covered("second", 16, BLOCKS) == 0
    coverage.covered("third", 16, BLOCKS[1:])
    assert coverage.covered("third", 16, BLOCKS[1:]) == 12


def test_a_request_that_lost_its_blocks_has_no_draft_kv():
    coverage = DraftCoverage(4)
    coverage.covered("r", 0, BLOCKS)
    coverage.draft_read("r", 9, BLOCKS)
    coverage.forget(["r"])
    assert coverage.covered("r", 0, BLOCKS) == 0


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 5)), max_size=30), st.integers(1, 6))
@settings(max_examples=60, deadline=None)
def test_shared_coverage_never_exceeds_the_computed_tokens(steps, block_size):
    coverage, blocks = DraftCoverage(block_size), np.arange(200, dtype=np.int32)
    computed, read, whole = coverage.covered("r", 0, blocks), 0, True
    for drafting, tokens in steps:
        computed += tokens
        if drafting:
            # Catching up reads everything.
            coverage.draft_read("r", computed, blocks)
            read = computed
        else:
            coverage.target_alone("r", computed, blocks)
            whole = False
    assert coverage.covered("r", computed, blocks) == read
    inherited = coverage.covered("next", computed, blocks)
    assert inherited <= read
    if whole:
        assert inherited == computed // block_size * block_size


def test_blocks_are_marked_incomplete_only_once():
    """Without drafts, ``target_alone`` is called for each request in every step."""
    coverage = DraftCoverage(4)
    coverage.covered("r", 0, BLOCKS)
    coverage.target_alone("r", 9, BLOCKS)
    coverage.target_alone("r", 12, None)
    coverage.draft_read("r", 12, BLOCKS)
    assert coverage.covered("second", 12, BLOCKS) == 12
    coverage.target_alone("r", 13, BLOCKS)
    assert coverage.covered("third", 16, BLOCKS) == 12


def test_a_partly_covered_block_is_incomplete_when_the_target_fills_it():
    coverage = DraftCoverage(4)
    coverage.covered("r", 0, BLOCKS)
    coverage.target_alone("r", 8, BLOCKS)
    coverage.draft_read("r", 6, BLOCKS)
    coverage.target_alone("r", 8, BLOCKS)
    coverage.forget(["r"])
    assert coverage.covered("second", 8, BLOCKS) == 4
    # Its blocks may be others when it comes back.
    coverage.draft_read("second", 8, BLOCKS)
    coverage.covered("r", 0, BLOCKS)
    coverage.target_alone("r", 8, BLOCKS)
    assert coverage.covered("third", 8, BLOCKS) == 0
