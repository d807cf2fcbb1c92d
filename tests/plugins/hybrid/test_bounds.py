"""The benchmark's bound: the least time with two sources, known beforehand."""

import json

import pytest
from drafter_bounds import StepPrices, Text, min_time, texts_of

PRICES = StepPrices(verifying=0.2, row=0.05, drafting=0.3, draft_pass=0.1)


def test_without_drafts_a_token_is_a_step():
    assert min_time(Text([0] * 5, [0] * 5), PRICES) == pytest.approx(5.0)


def test_it_drafts_what_will_be_accepted_and_pays():
    # One step of three drafts brings four tokens.
    assert min_time(Text([3, 2, 1, 0], [0] * 4), PRICES) == pytest.approx(1.35)
    assert min_time(Text([0] * 4, [3, 2, 1, 0]), PRICES) == pytest.approx(1.35 + 0.6)
    # A single token of the draft model would cost 0.65 of a step for one step.
    assert min_time(Text([0, 0], [1, 0]), PRICES) == pytest.approx(1.65)
    costly = StepPrices(verifying=0.2, row=0.05, drafting=0.9, draft_pass=0.1)
    assert min_time(Text([0, 0], [1, 0]), costly) == pytest.approx(2.0)


def test_costs_are_found_again():
    steps = [(PRICES.step(n, p), n, p) for n in (0, 1, 4, 16) for p in (0, 1, 3, 8)]
    found = StepPrices.fitted([*steps, (9.0, 4, 0)])  # one hiccup
    assert found.plain() == pytest.approx(PRICES.plain(), abs=0.01)


def test_texts_are_read_with_what_each_source_knew(tmp_path):
    tokens = [5, 6, 7, 8, 9, 5, 6, 7, 8, 9, 1]
    record = {"prompt_tokens": 4, "tokens": tokens, "drafts": {"5": [5, 6, 3], "8": [8, 2]}}
    (tmp_path / "record").write_text(json.dumps(record) + "\n")
    [text] = texts_of(tmp_path / "record")
    assert text.model == [2, 1, 0, 1, 0, 0]
    # Lookups match two tokens or more: behind "5 6" comes what came there before.
    assert text.lookup == [0, 0, 3, 2, 1, 0]


def test_behind_a_draft_that_was_accepted_as_a_whole_the_model_counts_as_right(tmp_path):
    record = {"prompt_tokens": 1, "tokens": [1, 2, 3, 4, 5, 6, 7], "drafts": {"2": [3, 4], "5": [6, 9]}}
    (tmp_path / "record").write_text(json.dumps(record) + "\n")
    [text] = texts_of(tmp_path / "record")
    assert text.model == [4, 3, 2, 1, 0]
