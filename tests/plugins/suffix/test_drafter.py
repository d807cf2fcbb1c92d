"""The lookup drafter: sources, tenants, learning, cost."""

import time
from types import SimpleNamespace

import numpy as np
import pytest

from vllm_instant import DraftRequest
from vllm_instant.interfaces.drafter import DeviceRequest
from vllm_instant_plugins.suffix.cache_salt_groups import MAX_GROUPS, CacheSaltGroups
from vllm_instant_plugins.suffix.calibration import count_accepted
from vllm_instant_plugins.suffix.device_drafter import SuffixDeviceDrafter
from vllm_instant_plugins.suffix.drafter import SuffixDrafter
from vllm_instant_plugins.suffix.plugin import SuffixOptions


def _request(name, tokens, most=8, prompt=None, salt=""):
    array = np.array(tokens, np.int32)
    return DraftRequest(name, array, len(tokens) if prompt is None else prompt, most, salt)


def _draft(drafter, *args, **kwargs):
    return list(drafter.propose([_request(*args, **kwargs)])[0].token_ids)


STORY = list(range(100, 130))


def test_its_own_prompt_is_searched():
    drafter = SuffixDrafter(512, 0)
    assert _draft(drafter, "a", [*STORY, 7, 100, 101, 102], most=4) == [103, 104, 105, 106]


def test_its_own_output_is_searched_as_it_grows():
    drafter = SuffixDrafter(512, 0)
    tokens = [1, 2]
    assert _draft(drafter, "a", tokens) == []
    tokens += [*STORY, 9]
    assert _draft(drafter, "a", tokens, prompt=2) == []
    tokens += STORY[:3]
    assert _draft(drafter, "a", tokens, prompt=2, most=2) == STORY[3:5]


def _after_an_answer(salt_of_first, salt_of_second, **options):
    drafter = SuffixDrafter(512, 10_000, **options)
    prompt = [1, 2, 3]
    drafter.propose([_request("a", [*prompt, *STORY], prompt=3, salt=salt_of_first)])
    drafter.forget("a")
    return _draft(drafter, "b", [50, 51, *STORY[:4]], prompt=6, most=3, salt=salt_of_second)


def test_answers_of_ended_requests_are_searched_where_the_operator_shares_them():
    assert _after_an_answer("", "", share_across_cache_salts=True) == STORY[4:7]


def test_requests_without_a_cache_salt_may_be_of_strangers_and_share_nothing():
    assert _after_an_answer("", "") == []


def test_other_cache_salts_are_not_searched_unless_asked_for():
    assert _after_an_answer("one", "two") == []
    assert _after_an_answer("one", "") == []
    assert _after_an_answer("one", "one") == STORY[4:7]
    assert _after_an_answer("one", "two", share_across_cache_salts=True) == STORY[4:7]


def test_prompts_of_other_requests_are_never_proposed():
    drafter = SuffixDrafter(512, 10_000)
    drafter.propose([_request("a", [*STORY, 1, 2], prompt=len(STORY))])
    drafter.forget("a")
    assert _draft(drafter, "b", [*STORY[:4]]) == []


def test_without_history_tokens_there_is_no_history():
    drafter = SuffixDrafter(512, 0)
    drafter.propose([_request("a", [1, 2, 3, *STORY], prompt=3)])
    drafter.forget("a")
    assert _draft(drafter, "b", [50, 51, *STORY[:4]]) == []


def test_the_number_of_cache_salts_is_bounded():
    drafter = SuffixDrafter(64, 1000)
    for number in range(MAX_GROUPS + 50):
        drafter.propose([_request("a", [1, 2], salt=str(number))])
        drafter.forget("a")
    assert len(drafter._groups) == MAX_GROUPS


def test_a_request_that_restarts_is_indexed_again():
    drafter = SuffixDrafter(512, 0)
    _draft(drafter, "a", [*STORY, 1, 2])
    assert _draft(drafter, "a", [8, 9, 10, 8, 9], most=1) == [10]


def test_confidence_is_the_acceptance_rate():
    """A text in which what follows a match is random half of the time: confidence of first tokens tends to it."""
    random = np.random.default_rng(0)
    drafter = SuffixDrafter(4096, 0)
    tokens = list(range(8))
    said = kept = 0.0
    for step in range(3000):
        draft = drafter.propose([_request("a", tokens, most=1, prompt=8)])[0]
        token = int(random.integers(0, 1000)) + 8 if random.random() < 0.5 else tokens[-7]
        if len(draft.token_ids) and step > 1500:
            said += draft.confidence[0]
            kept += draft.token_ids[0] == token
        tokens.append(token)
    assert said == pytest.approx(kept, rel=0.15)


@pytest.mark.parametrize(
    ("proposed", "came", "expected"),
    [([1, 2, 3], [1, 2, 3, 4], (3, 3)), ([1, 2, 3], [1, 9], (2, 1)), ([1, 2], [1], (1, 1)), ([1], [], (0, 0))],
)
def test_only_what_can_be_compared_counts(proposed, came, expected):
    assert count_accepted(np.array(proposed, np.int32), np.array(came, np.int32)) == expected


@pytest.mark.perf
def test_a_lookup_costs_little_at_long_context():
    """The bar is 50 us at 4k tokens on one quiet core; the test allows for a busy one."""
    random = np.random.default_rng(1)
    drafter = SuffixDrafter(8192, 100_000)
    drafter.warm_up()
    tokens = random.integers(0, 60, 4500).astype(np.int32)
    best = np.inf
    for stop in range(4000, 4500):
        request = DraftRequest("a", tokens[:stop], 4000, 16)
        began = time.perf_counter()
        drafter.propose([request])
        best = min(best, time.perf_counter() - began) if stop > 4000 else best
    assert best < 200e-6


@pytest.mark.parametrize("key", ["share_across_cache_salts", "across_tenants"])
def test_the_history_is_shared_across_cache_salts_by_either_option_key(key):
    assert SuffixOptions.model_validate({key: True}).share_across_cache_salts
    assert not SuffixOptions.model_validate({}).share_across_cache_salts


def test_on_the_device_nothing_is_resumed_for_the_next_request_of_a_row():
    forgotten = []
    lookup = SimpleNamespace(forget=forgotten.append)
    drafter = SuffixDeviceDrafter(lookup, CacheSaltGroups(False), "cpu")
    drafter.forget_on_device(DeviceRequest("a", 3, 2, 10, None, None))
    assert forgotten == [3]
