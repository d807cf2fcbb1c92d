"""Output lengths are predicted from finished requests."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_instant import RequestState
from vllm_instant.scheduling.request_registry import prompt_group
from vllm_instant_plugins.similarity.features import LengthRegressor
from vllm_instant_plugins.similarity.output_length_predictor import MIN_OBSERVATIONS, OutputLengthPredictor


def _request(prompt=(), max_tokens=4096, output=0, index=0, temperature=0.0):
    state = RequestState(
        "r", len(prompt), max_tokens, temperature, prompt_token_ids=prompt, num_output_tokens=output, index=index
    )
    state.prompt_group = prompt_group(prompt)
    return state


def _learn(predictor, prompt, tokens, max_tokens=4096):
    predictor.add(_request(prompt, max_tokens))
    predictor.learn(predictor.remove(0), min(tokens, max_tokens))


def _expected(predictor, prompt, done=0, max_tokens=4096):
    predictor.add(_request(prompt, max_tokens))
    return float(predictor.remaining(np.array([0]), np.array([float(done)]))[0])


CHAT, REPORT = [1] * 40, [2] * 40


@pytest.fixture(scope="module")
def trained():
    """Two system prompts: one is answered in about 12 tokens, the other in about 300; 80 finished requests."""
    random = np.random.default_rng(0)
    predictor = OutputLengthPredictor()
    for number in range(80):
        short = number % 2 == 0
        tokens = random.integers(8, 17) if short else random.integers(200, 401)
        _learn(predictor, (CHAT if short else REPORT) + random.integers(100, 4000, 12).tolist(), int(tokens))
    return predictor


def test_predictions_are_used_after_fifty_finished_requests(trained):
    assert trained.useful
    assert not OutputLengthPredictor().useful
    assert trained.num_observed == 80 > MIN_OBSERVATIONS
    assert 8 < _expected(trained, [*CHAT, 7]) < 20
    assert 230 < _expected(trained, [*REPORT, 7]) < 370


def test_running_requests_are_predicted_given_the_tokens_generated_so_far(trained):
    """A nearly complete long answer has few tokens left; an answer that exceeded the short lengths is not short."""
    assert _expected(trained, [*REPORT, 7], done=350) < 60
    assert _expected(trained, [*CHAT, 7], done=60) > 60


def test_predictions_never_exceed_the_limit(trained):
    assert _expected(trained, [*REPORT, 7], max_tokens=50) <= 50
    assert _expected(trained, [*REPORT, 7], done=45, max_tokens=50) <= 5


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(1, 5000)), max_size=40),
    st.integers(0, 6000),
    st.integers(1, 8192),
)
def test_predictions_are_distributions(history, done, limit):
    predictor = OutputLengthPredictor()
    for kind, tokens in history:
        _learn(predictor, [kind] * 40, tokens)
    predictor.add(_request([0] * 40, limit))
    [survival] = predictor.survival(np.array([0]))
    assert survival[0] == pytest.approx(1.0)
    assert (np.diff(survival) <= 1e-12).all()
    assert survival[-1] >= -1e-12
    remaining = predictor.remaining(np.array([0]), np.array([float(done)]))[0]
    assert 1.0 <= remaining <= max(1.0, limit)
    quantiles = [predictor.quantile(0, level, done) for level in (0.1, 0.5, 0.9)]
    assert quantiles == sorted(quantiles)


def test_truncated_answers_count_as_longer():
    """All are truncated at 64 tokens, which does not show that any would have ended there."""
    truncated, complete = OutputLengthPredictor(), OutputLengthPredictor()
    for _ in range(100):
        _learn(truncated, CHAT, 64, max_tokens=64)
        _learn(complete, CHAT, 64)
    assert _expected(complete, CHAT) < 90
    assert _expected(truncated, CHAT) > 150


def test_quantiles_are_calibrated():
    """On a stream of several classes with wide distributions, and after these have changed."""
    random = np.random.default_rng(1)
    predictor = OutputLengthPredictor()
    for number in range(600):
        kind = int(random.integers(0, 3))
        middle = (20, 100, 400)[kind] * (3 if number > 250 else 1)
        _learn(predictor, [kind] * 40, max(1, int(random.lognormal(np.log(middle), 0.7))))
    assert predictor.calibration_error < 0.06


def test_the_calibration_error_shows_a_wrong_predictor(trained):
    predictor = OutputLengthPredictor()
    predictor.restore(json.loads(json.dumps(trained.state())))
    before = predictor.calibration_error
    for _ in range(60):
        # Predicted from the same counts each time, while outcomes follow another distribution.
        request = _request([*CHAT, 7])
        predictor.add(request)
        predictor._update_coverage(predictor.remove(0).first_survival, 700, False)
    assert predictor.calibration_error > before + 0.1


def test_words_of_the_question_predict_where_the_system_prompt_is_shared():
    """One system prompt; a word of the question determines the length of the answer."""
    random = np.random.default_rng(2)
    predictor = OutputLengthPredictor()
    long_word, short_word = 777, 778
    for _ in range(150):
        long = random.random() < 0.5
        question = random.integers(1000, 4000, 10).tolist()
        question[int(random.integers(0, 10))] = long_word if long else short_word
        _learn(predictor, CHAT + question, int(random.integers(300, 500) if long else random.integers(10, 20)))
    filler = list(range(1000, 1009))
    assert _expected(predictor, [*CHAT, *filler, long_word]) > 3 * _expected(predictor, [*CHAT, *filler, short_word])


def test_a_saved_predictor_is_restored(trained):
    other = OutputLengthPredictor()
    other.restore(json.loads(json.dumps(trained.state())))
    for prompt in (CHAT, REPORT):
        assert _expected(other, [*prompt, 9]) == pytest.approx(_expected(trained, [*prompt, 9]), rel=0.02)
    assert other.useful


@pytest.mark.parametrize("harm", [{"edges": [1]}, {"events": [[1.0]]}, {"log_weights": []}, {"scores": [1.0]}])
def test_the_state_of_another_release_is_refused(trained, harm):
    with pytest.raises((KeyError, TypeError, ValueError)):
        OutputLengthPredictor().restore(trained.state() | harm)


def test_refresh_predicts_waiting_requests_again(trained):
    predictor = OutputLengthPredictor()
    predictor.add(_request([*CHAT, 7], index=1))
    before = predictor.remaining(np.array([1]), np.zeros(1))[0]
    for _ in range(60):
        _learn(predictor, CHAT, 12)
    assert predictor.remaining(np.array([1]), np.zeros(1))[0] == before, "the last prediction is used until then"
    predictor.refresh(np.array([1]))
    assert predictor.remaining(np.array([1]), np.zeros(1))[0] < before / 4


def test_contexts_are_bounded(monkeypatch):
    monkeypatch.setattr("vllm_instant_plugins.similarity.output_length_predictor.MAX_CONTEXTS", 64)
    predictor = OutputLengthPredictor()
    for number in range(300):
        _learn(predictor, [number] * 40, 10)
        _learn(predictor, CHAT, 100)
    assert len(predictor._row_of_context) <= 70
    assert 60 < _expected(predictor, CHAT) < 140, "the most frequent context is kept"


def test_the_regressor_learns_only_a_lower_bound_from_truncated_answers():
    regressor = LengthRegressor()
    features = regressor.features(_request(CHAT))
    for _ in range(200):
        regressor.learn(features, 256, truncated=False)
    assert regressor.predict(features) == pytest.approx(8, abs=0.3)
    before = regressor.predict(features)
    regressor.learn(features, 16, truncated=True)
    assert regressor.predict(features) == before
    for _ in range(50):
        regressor.learn(features, 2048, truncated=True)
    assert regressor.predict(features) > before + 0.5


def test_words_of_the_question_predict_where_every_prompt_begins_differently():
    random = np.random.default_rng(1)

    def prompt(long):
        asked = [7, 8] if long else [9, 11]
        return [*random.integers(100, 4000, 34).tolist(), *asked, *random.integers(100, 4000, 6).tolist()]

    predictor = OutputLengthPredictor()
    for number in range(200):
        long = number % 4 == 0
        _learn(predictor, prompt(long), int(random.integers(200, 401) if long else random.integers(8, 17)))
    short_ones, long_ones = ([_expected(predictor, prompt(long)) for _ in range(20)] for long in (False, True))
    assert np.mean(long_ones) > 5 * np.mean(short_ones)
