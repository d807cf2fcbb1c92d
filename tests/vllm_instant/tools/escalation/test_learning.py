"""Rules that are learned, and reports on them, from made-up prompts whose better end is known."""

import json
import random

import httpx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_instant.escalation.learned_rule import LearnedRule
from vllm_instant.tools.escalation import report
from vllm_instant.tools.escalation.ask import End, ask_both
from vllm_instant.tools.escalation.examples import (
    Example,
    Judge,
    exact_match,
    function_scorer,
    read_examples,
    read_lines,
)
from vllm_instant.tools.escalation.learning import Z, choose_threshold, fit_rule, folds, is_deep_better
from vllm_instant.tools.escalation.report import _Prompts, judge

WORDS = ("alpha", "beta", "gamma", "delta", "river", "stone", "cloud", "table")


def _examples(deep_is_better, count=160, seed=0, deep_cost=1.0):
    """Prompts of random words, half of them with ``prove``; ``deep_is_better`` of the prompt is right in 19 of 20."""
    dice = random.Random(seed)
    found = []
    for number in range(count):
        words = dice.choices(WORDS, k=dice.randrange(3, 60)) + (["prove"] if number % 2 else [])
        dice.shuffle(words)
        prompt = f"{' '.join(words)} {number}"
        better = deep_is_better(prompt, dice) is not (dice.random() < 0.05)
        found.append(Example({"prompt": prompt}, 0.3, 0.9 if better else 0.3, 0.0, deep_cost))
    return found


@pytest.fixture(scope="module", autouse=True)
def _few_draws():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "DRAWS", 200)
        yield


@pytest.fixture(scope="module")
def by_word():
    return judge(_examples(lambda prompt, dice: "prove" in prompt), "share of deep answers", 0.05)


def test_what_the_text_tells_is_learned_and_recommended(by_word):
    assert by_word.reasons == ()
    assert by_word.over_random_mix.low > 0.05
    assert by_word.over_length.low > 0.05
    assert by_word.loss.mean < 0.06
    assert 0.3 < by_word.share < 0.7
    assert by_word.rule_cost == pytest.approx(by_word.share)
    half = by_word.frontier[4]
    assert (half.share, half.cost) == (0.5, 0.5)
    assert half.learned.low > half.random_mix.high
    assert half.random_mix.mean == pytest.approx((by_word.fast.mean + by_word.deep.mean) / 2)
    assert json.loads(json.dumps(by_word.plain()))["frontier"][0]["share"] == 0.1


def test_what_the_text_does_not_tell_is_not_recommended():
    found = judge(_examples(lambda prompt, dice: dice.random() < 0.5), "share of deep answers", 0.05)
    assert any("does not beat a random mix" in reason or "answers everything" in reason for reason in found.reasons)


def test_a_rule_that_only_knows_the_length_is_not_recommended():
    found = judge(_examples(lambda prompt, dice: len(prompt) > 190), "share of deep answers", 0.05)
    assert found.over_random_mix.low > 0
    assert any("does not beat the prompt's length" in reason for reason in found.reasons)


def test_deep_answers_that_cost_nothing_more_are_not_recommended():
    found = judge(_examples(lambda prompt, dice: "prove" in prompt, deep_cost=0.0), "cost", 0.05, _rule_for("prove"))
    assert any("costs no more" in reason for reason in found.reasons)


def _rule_for(word, threshold=0.5):
    from vllm_instant.escalation.features import FORM

    count = len(FORM) + 1
    return LearnedRule(
        vocabulary=(word,),
        mean=(0.0,) * count,
        scale=(1.0,) * count,
        coefficients=(*(0.0,) * (count - 1), 8.0),
        intercept=-4.0,
        slope=-1.0,
        offset=0.0,
        threshold=threshold,
    )


def test_a_given_rule_is_judged_by_its_own_threshold():
    examples = _examples(lambda prompt, dice: "prove" in prompt, seed=3)
    good = judge(examples, "cost", 0.05, _rule_for("prove"))
    assert (good.reasons, good.threshold, good.share) == ((), 0.5, 0.5)
    loses = judge(examples, "cost", 0.05, _rule_for("absent"))
    assert any("against always deep, more than 0.05" in reason for reason in loses.reasons)


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        ([], "0 prompts are too few"),
        (_examples(lambda prompt, dice: True, count=49), "49 prompts are too few"),
        (_examples(lambda prompt, dice: False, count=60), "of 60 prompts: at least 10 of both kinds"),
    ],
)
def test_too_few_prompts_get_one_sentence(examples, message):
    with pytest.raises(ValueError, match=message):
        judge(examples, "cost", 0.05)


def test_probabilities_are_calibrated_and_words_chosen():
    examples = _examples(lambda prompt, dice: "prove" in prompt, seed=1)
    rule = fit_rule(examples)
    assert "prove" in rule.vocabulary
    probabilities = np.array([rule.probability(example.body) for example in examples])
    assert probabilities.mean() == pytest.approx(is_deep_better(examples).mean(), abs=0.05)
    with_word = np.array(["prove" in example.body["prompt"] for example in examples])
    assert probabilities[with_word].mean() > 0.8
    assert probabilities[~with_word].mean() < 0.2


def test_equal_prompts_are_in_one_fold():
    examples = _examples(lambda prompt, dice: "prove" in prompt, count=60) * 2
    for learned, held_out in folds(examples):
        assert not {examples[i].body["prompt"] for i in learned} & {examples[i].body["prompt"] for i in held_out}


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(-1, 1)), min_size=3, max_size=40), st.floats(0, 0.5))
def test_a_threshold_keeps_its_loss(pairs, max_loss):
    probabilities, gains = (np.array(column) for column in zip(*pairs, strict=True))
    threshold = choose_threshold(probabilities, gains, max_loss)
    losses = np.where(probabilities < threshold, gains, 0.0)
    assert losses.mean() + Z * losses.std(ddof=1) / np.sqrt(len(gains)) <= max_loss + 1e-12


def test_thresholds_rise_with_the_loss_that_is_allowed():
    probabilities, gains = np.linspace(0, 1, 50), np.full(50, 0.1)
    assert choose_threshold(probabilities, gains, 0.0) == 0.0
    thresholds = [choose_threshold(probabilities, gains, loss) for loss in (0.03, 0.06, 0.2)]
    assert thresholds == sorted(thresholds)
    assert thresholds[-1] == 1.0


def test_equal_costs_are_equal():
    examples = [Example({"prompt": "x" * n}, 0.0, 1.0, 1.0, 1.0 + n % 3) for n in range(1, 30)]
    prompts = _Prompts(examples)
    for cost in (1.0, 1.4, 1.9, 2.0):
        for chosen in (prompts.mix(cost), prompts.first(prompts.length, cost), prompts.first(np.zeros(29), cost)):
            assert prompts.expense(chosen) == pytest.approx(cost, abs=1e-6)
    long_first = prompts.first(prompts.length, 1.4)
    assert long_first[-1] == 1
    assert long_first[0] == 0


LINE = {"prompt": "p", "fast": "4", "deep": "five", "reference": " five "}


def _file(tmp_path, *lines):
    path = tmp_path / "answers.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


def test_scores_and_costs_of_a_file(tmp_path):
    scored = {"prompt": "p", "fast_score": 0.25, "deep_score": 1, "fast_seconds": 2, "deep_seconds": 4, "x": 1}
    examples, cost = read_examples(_file(tmp_path, scored))
    assert (examples, cost) == ([Example({"prompt": "p"}, 0.25, 1.0, 2.0, 4.0)], "seconds")
    examples, cost = read_examples(_file(tmp_path, {**scored, "fast_cost": 7, "deep_cost": 8}))
    assert (examples[0].fast_cost, examples[0].deep_cost, cost) == (7.0, 8.0, "cost")
    examples, cost = read_examples(_file(tmp_path, LINE), exact_match)
    assert (examples[0].fast_score, examples[0].deep_score, cost) == (0.0, 1.0, "share of deep answers")
    examples, _ = read_examples(_file(tmp_path, LINE), function_scorer(f"{__name__}:_by_length"))
    assert (examples[0].fast_score, examples[0].deep_score) == (0.1, 0.4)


def _by_length(line, answer):
    return len(answer) / 10


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1 is no JSON"),
        ({"fast": "x"}, "line 1 has neither prompt nor messages"),
        ({"prompt": "p"}, "line 1 has no 'fast_score'"),
        ({"prompt": "p", "fast_score": 2, "deep_score": 1}, "scores must lie in 0..1"),
    ],
)
def test_mistakes_in_a_file_get_one_sentence(tmp_path, line, message):
    with pytest.raises(ValueError, match=message):
        read_examples(_file(tmp_path, line))
    with pytest.raises(ValueError, match="cannot be read"):
        list(read_lines(tmp_path / "none"))
    with pytest.raises(ValueError, match="there is no function"):
        function_scorer("json:nothing")


def _chat(text, **more):
    return httpx.Response(200, json={"choices": [{"message": {"content": text}}], **more})


def test_a_judge_grades_each_answer_alone():
    said, asked = ["10", "Grade: 3.", "fine"], []

    def handle(request):
        asked.append(json.loads(request.content)["messages"][0]["content"])
        return _chat(said.pop(0))

    grader = Judge("http://j", "m", client=httpx.Client(base_url="http://j", transport=httpx.MockTransport(handle)))
    assert (grader(LINE, "five"), grader(LINE, "4")) == (1.0, 0.3)
    assert "five" in asked[0]
    assert "five" not in asked[1]
    with pytest.raises(ValueError, match="gave no grade"):
        grader(LINE, "4")


def test_both_ends_are_asked_the_same(tmp_path):
    asked = []

    def end(name):
        def handle(request):
            asked.append((name, request.url.path, json.loads(request.content)))
            if "messages" in asked[-1][2]:
                return _chat(name, usage={"completion_tokens": 3})
            return httpx.Response(200, json={"choices": [{"text": name}]})

        client = httpx.Client(base_url=f"http://{name}", transport=httpx.MockTransport(handle))
        ticks = iter(range(100))
        return End(client, f"{name}-model", 8, lambda: next(ticks))

    messages = [{"role": "user", "content": "x"}]
    lines = [{"prompt": "p", "reference": "r"}, {"messages": messages, "max_tokens": 2}]
    output = tmp_path / "out.jsonl"
    assert ask_both(lines, end("fast"), end("deep"), output, 1, lambda done: None) == 2
    written = [json.loads(line) for line in output.read_text().splitlines()]
    assert written[0] == {
        **lines[0],
        **{"fast": "fast", "fast_seconds": 1, "fast_tokens": 0, "deep": "deep", "deep_seconds": 1, "deep_tokens": 0},
    }
    assert written[1]["deep_tokens"] == 3
    common = {"temperature": 0, "model": "deep-model"}
    assert asked[1] == ("deep", "/v1/completions", {"prompt": "p", "max_tokens": 8, **common})
    assert asked[3] == ("deep", "/v1/chat/completions", {"messages": messages, "max_tokens": 2, **common})
