"""Output lengths are foretold from what finished requests showed."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_instant import RequestState
from vllm_instant.scheduling.request_registry import prompt_group
from vllm_instant_plugins.similarity.features import Scorer
from vllm_instant_plugins.similarity.output_length_predictor import USEFUL, LengthPredictor


def _request(prompt=(), max_tokens=4096, output=0, index=0, temperature=0.0):
    state = RequestState(
        "r", len(prompt), max_tokens, temperature, prompt_token_ids=prompt, num_output_tokens=output, index=index
    )
    state.prompt_group = prompt_group(prompt)
    return state


def _learn(predictor, prompt, tokens, max_tokens=4096):
    predictor.enter(_request(prompt, max_tokens))
    predictor.learn(predictor.release(0), min(tokens, max_tokens))


def _expected(predictor, prompt, done=0, max_tokens=4096):
    predictor.enter(_request(prompt, max_tokens))
    return float(predictor.remaining(np.array([0]), np.array([float(done)]))[0])


CHAT, REPORT = [1] * 40, [2] * 40


@pytest.fixture(scope="module")
def taught():
    """Two system prompts: one is answered in about 12 tokens, the other in about 300; 80 finished requests."""
    random = np.random.default_rng(0)
    predictor = LengthPredictor()
    for number in range(80):
        short = number % 2 == 0
        tokens = random.integers(8, 17) if short else random.integers(200, 401)
        _learn(predictor, (CHAT if short else REPORT) + random.integers(100, 4000, 12).tolist(), int(tokens))
    return predictor


def test_fifty_finished_requests_are_enough(taught):
    assert taught.useful
    assert not LengthPredictor().useful
    assert taught.observed == 80 > USEFUL
    assert 8 < _expected(taught, [*CHAT, 7]) < 20
    assert 230 < _expected(taught, [*REPORT, 7]) < 370


def test_what_goes_on_is_foretold_from_there(taught):
    """A long answer that is nearly done has little left; a short one that did not end is not short."""
    assert _expected(taught, [*REPORT, 7], done=350) < 60
    assert _expected(taught, [*CHAT, 7], done=60) > 60


def test_a_limit_is_never_passed(taught):
    assert _expected(taught, [*REPORT, 7], max_tokens=50) <= 50
    assert _expected(taught, [*REPORT, 7], done=45, max_tokens=50) <= 5


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(1, 5000)), max_size=40),
    st.integers(0, 6000),
    st.integers(1, 8192),
)
def test_what_is_foretold_is_a_distribution(history, done, limit):
    predictor = LengthPredictor()
    for kind, tokens in history:
        _learn(predictor, [kind] * 40, tokens)
    predictor.enter(_request([0] * 40, limit))
    [survival] = predictor.survival(np.array([0]))
    assert survival[0] == pytest.approx(1.0)
    assert (np.diff(survival) <= 1e-12).all()
    assert survival[-1] >= -1e-12
    remaining = predictor.remaining(np.array([0]), np.array([float(done)]))[0]
    assert 1.0 <= remaining <= max(1.0, limit)
    quantiles = [predictor.quantile(0, level, done) for level in (0.1, 0.5, 0.9)]
    assert quantiles == sorted(quantiles)


def test_answers_that_were_cut_off_count_as_longer():
    """All are cut off at 64: nothing says that any would have ended there."""
    cut, ended = LengthPredictor(), LengthPredictor()
    for _ in range(100):
        _learn(cut, CHAT, 64, max_tokens=64)
        _learn(ended, CHAT, 64)
    assert _expected(ended, CHAT) < 90
    assert _expected(cut, CHAT) > 150


def test_quantiles_are_calibrated():
    """On a stream of several classes with wide distributions, and after a change of what they say."""
    random = np.random.default_rng(1)
    predictor = LengthPredictor()
    for number in range(600):
        kind = int(random.integers(0, 3))
        middle = (20, 100, 400)[kind] * (3 if number > 250 else 1)
        _learn(predictor, [kind] * 40, max(1, int(random.lognormal(np.log(middle), 0.7))))
    assert predictor.calibration_error < 0.06


def test_the_calibration_error_shows_a_wrong_predictor(taught):
    predictor = LengthPredictor()
    predictor.restore(json.loads(json.dumps(taught.kept())))
    before = predictor.calibration_error
    for _ in range(60):
        # Foretold from the same counts again and again, while the world is another.
        request = _request([*CHAT, 7])
        predictor.enter(request)
        predictor._check(predictor.release(0).first_guess, 700, False)
    assert predictor.calibration_error > before + 0.1


def test_what_is_asked_tells_where_the_system_prompt_does_not():
    """One system prompt; a word of the question says how long the answer will be."""
    random = np.random.default_rng(2)
    predictor = LengthPredictor()
    long_word, short_word = 777, 778
    for _ in range(150):
        long = random.random() < 0.5
        question = random.integers(1000, 4000, 10).tolist()
        question[int(random.integers(0, 10))] = long_word if long else short_word
        _learn(predictor, CHAT + question, int(random.integers(300, 500) if long else random.integers(10, 20)))
    filler = list(range(1000, 1009))
    assert _expected(predictor, [*CHAT, *filler, long_word]) > 3 * _expected(predictor, [*CHAT, *filler, short_word])


def test_a_predictor_is_kept_and_restored(taught):
    other = LengthPredictor()
    other.restore(json.loads(json.dumps(taught.kept())))
    for prompt in (CHAT, REPORT):
        assert _expected(other, [*prompt, 9]) == pytest.approx(_expected(taught, [*prompt, 9]), rel=0.02)
    assert other.useful


@pytest.mark.parametrize("harm", [{"edges": [1]}, {"events": [[1.0]]}, {"log_weights": []}, {"scores": [1.0]}])
def test_what_another_release_kept_is_refused(taught, harm):
    with pytest.raises((KeyError, TypeError, ValueError)):
        LengthPredictor().restore(taught.kept() | harm)


def test_who_waits_is_foretold_again(taught):
    predictor = LengthPredictor()
    predictor.enter(_request([*CHAT, 7], index=1))
    before = predictor.remaining(np.array([1]), np.zeros(1))[0]
    for _ in range(60):
        _learn(predictor, CHAT, 12)
    assert predictor.remaining(np.array([1]), np.zeros(1))[0] == before, "what was foretold stands"
    predictor.refresh(np.array([1]))
    assert predictor.remaining(np.array([1]), np.zeros(1))[0] < before / 4


def test_contexts_are_bounded(monkeypatch):
    monkeypatch.setattr("vllm_instant_plugins.similarity.output_length_predictor.MAX_CONTEXTS", 64)
    predictor = LengthPredictor()
    for number in range(300):
        _learn(predictor, [number] * 40, 10)
        _learn(predictor, CHAT, 100)
    assert len(predictor._rows) <= 70
    assert 60 < _expected(predictor, CHAT) < 140, "what is seen most is kept"


def test_the_scorer_learns_from_what_was_cut_off_only_that_it_is_longer():
    scorer = Scorer()
    features = scorer.features(_request(CHAT))
    for _ in range(200):
        scorer.learn(features, 256, cut_off=False)
    assert scorer.score(features) == pytest.approx(8, abs=0.3)
    before = scorer.score(features)
    scorer.learn(features, 16, cut_off=True)
    assert scorer.score(features) == before
    for _ in range(50):
        scorer.learn(features, 2048, cut_off=True)
    assert scorer.score(features) > before + 0.5


def test_a_word_of_the_question_tells_where_every_prompt_begins_in_its_own_way():
    random = np.random.default_rng(1)

    def prompt(long):
        asked = [7, 8] if long else [9, 11]
        return [*random.integers(100, 4000, 34).tolist(), *asked, *random.integers(100, 4000, 6).tolist()]

    predictor = LengthPredictor()
    for number in range(200):
        long = number % 4 == 0
        _learn(predictor, prompt(long), int(random.integers(200, 401) if long else random.integers(8, 17)))
    short_ones, long_ones = ([_expected(predictor, prompt(long)) for _ in range(20)] for long in (False, True))
    assert np.mean(long_ones) > 5 * np.mean(short_ones)
