"""The lookup on the device, against brute force."""

import ahead_of_time
import pytest
from interpreting import interpreted
from suffix_lookup_cases import by_brute_force, filled, launches_of_lookup, looked_up

import vllm_instant_kernels.suffix_lookup as module

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


def test_own_tokens_are_searched_as_by_brute_force(numbers):
    for _ in range(6):
        requests = [
            _random_tokens(numbers, numbers.choice((1, 2, 3, 17, 40, 90)), numbers.choice((2, 5))) for _ in range(4)
        ]
        found = _drafts(requests, [1] * 4, DRAFTS)
        for tokens, draft in zip(requests, found, strict=True):
            expected, _ = by_brute_force(tokens, tokens, True, DRAFTS)
            assert draft == filled(expected, tokens[-1], DRAFTS)


def test_a_request_that_sampled_nothing_gets_no_lookup():
    repeated = [1, 2, 3, 1, 2]
    assert _drafts([repeated, repeated], [0, 1], 3) == [[2, 2, 2], [3, 1, 2]]


def test_outputs_of_a_group_are_proposed_to_it_alone():
    history = [(0, [7, 8, 9, 10]), (1, [7, 8, 11, 12])]
    requests = [[1, 7, 8]] * 4
    found = _drafts(requests, [1] * 4, 3, history, [0, 1, 2, module.NO_GROUP], 64)
    assert found == [[9, 10, 8], [11, 12, 8], [8, 8, 8], [8, 8, 8]]


def test_the_source_with_more_expected_tokens_is_used():
    long_match, short_match = [5, 6, 7, 8, 20, 21, 22], [7, 8, 30, 31, 32]
    assert _drafts([[*short_match, 5, 6, 7, 8]], [1], 3, [(0, long_match)], [0], 64) == [[20, 21, 22]]
    assert _drafts([[*long_match, 5, 6, 7, 8]], [1], 3, [(0, short_match)], [0], 64) == [[20, 21, 22]]


def test_the_ring_is_searched_as_by_brute_force_and_forgets_the_oldest(numbers):
    for capacity in (40, 64, 300):
        outputs = [_random_tokens(numbers, numbers.choice((1, 9, 25)), 3) for _ in range(10)]
        newest = _random_tokens(numbers, 12, 3)
        ring = [token for output in outputs for token in [*output, -1]][-capacity:]
        own, expected_own = by_brute_force(newest, newest, True, DRAFTS)
        other, expected_other = by_brute_force(newest, ring, False, DRAFTS)
        better = other if expected_other > expected_own + 1e-6 else own
        found = _drafts([newest], [1], DRAFTS, [(0, output) for output in outputs], [0], capacity)
        if abs(expected_other - expected_own) > 1e-6:
            assert found == [filled(better, newest[-1], DRAFTS)]


def test_an_output_longer_than_the_ring_leaves_its_newest_tokens():
    output = list(range(100, 160))
    assert _drafts([[157, 158]], [1], 2, [(0, output)], [0], 16) == [[159, 158]]
    assert _drafts([[100, 101]], [1], 2, [(0, output)], [0], 16) == [[101, 101]]


@pytest.mark.kernel
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_it_compiles_for_gpus_with_few_spilled_registers(capability, tmp_path):
    launches = ahead_of_time.launches(module, launches_of_lookup)
    assert [launch.name for launch in launches] == ["_append", "_find", "_vote", "_find", "_vote"]
    for launch in launches:
        assert ahead_of_time.compiled(launch, capability, tmp_path).spilled <= 64, launch.name
