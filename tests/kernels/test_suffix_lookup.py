"""The lookup on the device: the same drafts as on the host."""

import ahead_of_time
import numpy as np
import pytest
from interpreting import interpreted
from suffix_lookup_cases import filled, launches_of_lookup, looked_up, on_host, streamed, streamed_on_host

import vllm_instant_kernels.suffix_lookup as module
from vllm_instant_plugins.suffix.calibration import ConfidenceCalibrator
from vllm_instant_plugins.suffix.request_lookup import RequestLookup

DRAFTS = 5


def _random_tokens(numbers, length, alphabet=4):
    """Random tokens with repeated passages."""
    tokens = []
    while len(tokens) < length:
        if len(tokens) > 8 and numbers.random() < 0.3:
            start = numbers.randrange(len(tokens) - 4)
            tokens += tokens[start : start + numbers.randint(3, 12)]
        else:
            tokens.append(numbers.randrange(alphabet))
    return tokens[:length]


def _drafts(*arguments):
    return interpreted(looked_up, *arguments)[0].tolist()


def _is_that_of_the_host(draft, of_host, newest):
    """The host ends a draft where it becomes unlikely; the device continues, and fills up what none proposes."""
    return draft[: len(of_host)] == of_host and (of_host != [] or draft == filled([], newest, DRAFTS))


def test_own_tokens_are_searched_as_on_the_host(numbers):
    for _ in range(6):
        requests = [
            _random_tokens(numbers, numbers.choice((1, 2, 3, 17, 40, 90)), numbers.choice((2, 5, 30))) for _ in range(4)
        ]
        for tokens, draft in zip(requests, _drafts(requests, [1] * 4, DRAFTS), strict=True):
            assert _is_that_of_the_host(draft, on_host(tokens, DRAFTS), tokens[-1])


def test_its_expectation_is_the_one_that_the_host_begins_with():
    requests = [[1, 2, 3, 4, 1, 2], [7, 8, 5, 7, 8, 6, 7, 8], [4, 9, 4, 9, 4, 9, 4]]
    _, expected = interpreted(looked_up, requests, [1] * 3, 3)
    for tokens, found in zip(requests, expected.tolist(), strict=True):
        newest = np.array(tokens, np.int32)
        newest.flags.writeable = False
        draft = RequestLookup(len(tokens)).propose(newest, 3, ConfidenceCalibrator())
        assert found == pytest.approx(np.cumprod(draft.confidence).sum(), abs=0.01)


def _edited(numbers, length):
    """A text, and the same with some tokens replaced, left out or put before others."""
    text = [numbers.randrange(200) for _ in range(length)]
    copy = []
    for token in text:
        change = numbers.random()
        if change < 0.04:
            copy.append(500 + numbers.randrange(50))
        elif change < 0.08:
            copy += [500 + numbers.randrange(50), token]
        elif change > 0.96:
            continue
        else:
            copy.append(token)
    return text + copy


def test_a_copy_goes_on_behind_an_edit_as_on_the_host(numbers):
    requests = [_edited(numbers, 60) for _ in range(3)]
    width = min(map(len, requests))
    lengths, at = [], 62
    while at < width:
        lengths.append(at)
        at += numbers.randint(1, 4)
    requests = [tokens[:width] for tokens in requests]
    drafts = interpreted(streamed, requests, lengths, DRAFTS)[0].tolist()
    resumed = 0
    for row, tokens in enumerate(requests):
        for step, (length, of_host) in enumerate(zip(lengths, streamed_on_host(tokens, lengths, DRAFTS), strict=True)):
            assert _is_that_of_the_host(drafts[step][row], of_host, tokens[length - 1]), (row, length)
            # A token that was never there before has no occurrence: such a draft is of a resumed copy.
            resumed += bool(of_host) and tokens[length - 1] not in tokens[: length - 1]
    assert resumed


def test_a_request_that_sampled_nothing_gets_no_lookup():
    repeated = [1, 2, 3, 1, 2]
    assert _drafts([repeated, repeated], [0, 1], 3) == [[2, 2, 2], [3, 1, 2]]


def test_outputs_of_a_group_are_proposed_to_it_alone():
    history = [(0, [7, 8, 9, 10]), (1, [7, 8, 11, 12])]
    requests = [[1, 7, 8]] * 4
    found = _drafts(requests, [1] * 4, 3, history, [0, 1, 2, module.NO_GROUP], 64)
    assert found == [[9, 10, 8], [11, 12, 8], [8, 8, 8], [8, 8, 8]]


def test_own_tokens_and_those_of_others_vote_together():
    long_match, short_match = [5, 6, 7, 8, 20, 21, 22], [7, 8, 30, 31, 32]
    assert _drafts([[*short_match, 5, 6, 7, 8]], [1], 3, [(0, long_match)], [0], 64) == [[20, 21, 22]]
    assert _drafts([[*long_match, 5, 6, 7, 8]], [1], 3, [(0, short_match)], [0], 64) == [[20, 21, 22]]
    # Neither source alone has a majority: 9 follows once here, and twice there.
    own, others = [1, 7, 8, 9, 2, 7, 8, 4, 3, 7, 8], [(0, [7, 8, 4, 7, 8, 9, 7, 8, 9])]
    assert _drafts([own], [1], 1, others, [0], 64) == [[9]]


def test_the_ring_is_searched_as_on_the_host_and_forgets_the_oldest(numbers):
    for capacity in (40, 64, 300):
        for _ in range(3):
            outputs = [
                (numbers.randrange(2), _random_tokens(numbers, numbers.choice((1, 9, 25)), 6)) for _ in range(10)
            ]
            newest = _random_tokens(numbers, 12, 6)
            [draft] = _drafts([newest], [1], DRAFTS, outputs, [0], capacity)
            assert _is_that_of_the_host(draft, on_host(newest, DRAFTS, outputs, 0, capacity), newest[-1])


def test_a_row_of_another_request_resumes_nothing():
    import torch

    from vllm_instant_kernels.suffix_lookup import SuffixLookup

    lookup = SuffixLookup(2, 16, 2, 0, "cpu")
    lookup._state.copy_(torch.arange(8).reshape(2, 4))
    lookup.forget(1)
    assert lookup._state.tolist() == [[0, 1, 2, 3], [-1, -1, -1, -1]]


def test_an_output_longer_than_the_ring_leaves_its_newest_tokens():
    output = list(range(100, 160))
    assert _drafts([[157, 158]], [1], 2, [(0, output)], [0], 16) == [[159, 158]]
    assert _drafts([[100, 101]], [1], 2, [(0, output)], [0], 16) == [[101, 101]]


@pytest.mark.kernel
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_it_compiles_for_gpus_with_few_spilled_registers(capability, tmp_path):
    launches = ahead_of_time.launches(module, launches_of_lookup)
    assert [launch.name for launch in launches] == ["_append", "find", "find", "vote"]
    for launch in launches:
        assert ahead_of_time.compiled(launch, capability, tmp_path).spilled <= 64, launch.name
