"""Rules find what they are told to find, however it is written and wherever tokens end, and nothing else."""

import json
import random
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_instant.deployment.errors import DeploymentError
from vllm_instant.deployment.settings import resolve
from vllm_instant.interfaces.guard import Action, GuardRequest
from vllm_instant_plugins.guard.canonical import Canonical, canonical
from vllm_instant_plugins.guard.plugin import RulesOptions, build_rules
from vllm_instant_plugins.guard.rules import Rules, RuleSet

WORDS = ("bomb", "secret plan", "café")
PATTERNS = (r"\b\d{4}[ -]?\d{4}\b", r"[a-z]+@[a-z]+\.com", r"ab(c|de)*f")


def begin(words=WORDS, patterns=PATTERNS, action=Action.STOP, side="answer", **options):
    rules = Rules(RuleSet(words, patterns, **options), action)
    return rules.begin(GuardRequest(request_id="r", side=side))


def judged(judge, parts):
    """The verdicts of a text in parts, up to a stop."""
    found = []
    for number, part in enumerate(parts, start=1):
        found.append(judge.judge(part, (), number == len(parts)))
        if found[-1].action is Action.STOP:
            break
    return found


def cut(text, sizes):
    parts, position = [], 0
    for size in sizes:
        parts.append(text[position : position + size])
        position += size
    return [*parts, text[position:]]


@pytest.mark.parametrize(
    ("text", "position"),
    [
        ("a bomb here", 2),
        ("a BOMB", 2),
        ("a b\u200bo\u00admb", 2),
        ("a bo\u0301mb", 2),
        ("a ｂｏｍｂ", 2),
        ("a ḇömb", 2),
        ("a bоmb", 2),  # Cyrillic
        ("a 𝐛𝐨𝐦𝐛!", 2),
        ("the secret \n\t plan", 4),
        ("Café", 0),
        ("cafe", 0),
        ("1234-5678", 0),
        ("id 1234 5678.", 3),
        ("write me@there.com", 6),
        ("xabcdecf", 1),
        ("ABF", 0),
        ("a bombastic plan", None),
        ("a firebomb", None),
        ("secret plans", None),
        ("1234-56789", None),
        ("me@there.org", None),
        ("abcde", None),
        ("", None),
    ],
)
@pytest.mark.parametrize("size", [1, 2, 5, 100])
def test_matches_are_found_whatever_the_parts(text, position, size):
    parts = [text[start : start + size] for start in range(0, len(text), size)] or [""]
    last = judged(begin(), parts)[-1]
    if position is None:
        assert (last.upto, last.action) == (len(text), Action.PASS)
    else:
        assert (last.upto, last.action) == (position, Action.STOP)


FRAGMENTS = ["bomb", "bo", "mb", " ", "secret", " plan", "1234", "-", "5678", "me@", "there", ".com", "ab", "c", "f"]
FRAGMENTS += ["\u200b", "é", "cafe", "\n", "✨", "e\u0301", "BOMB", "x"]


@given(
    pieces=st.lists(st.sampled_from(FRAGMENTS), max_size=15),
    sizes=st.lists(st.integers(0, 6), max_size=20),
    action=st.sampled_from([Action.STOP, Action.REPLACE]),
)
def test_parts_are_judged_as_the_whole_text_is(pieces, sizes, action):
    text = "".join(pieces)
    whole = judged(begin(action=action), [text])[-1]
    found = judged(begin(action=action), cut(text, sizes))
    spans = [(span.start, span.end) for verdict in found for span in verdict.replacements]
    assert (found[-1].upto, found[-1].action is Action.STOP) == (whole.upto, whole.action is Action.STOP)
    assert spans == [(span.start, span.end) for span in whole.replacements]
    # Nothing of a violation was passed before it was complete.
    if whole.action is Action.STOP:
        assert all(verdict.upto <= whole.upto for verdict in found)
    for start, end in spans:
        assert not any(start < verdict.upto < end for verdict in found)


@given(st.text(max_size=30), st.lists(st.integers(0, 5), max_size=10))
def test_the_canonical_form_does_not_depend_on_the_parts(text, sizes):
    mapped = Canonical()
    letters, origins = "", []
    for part in cut(text, sizes):
        more, positions = mapped.add(part)
        letters += more
        origins += positions
    assert letters == canonical(text)
    assert len(origins) == len(letters)
    assert origins == sorted(origins)


def test_other_scripts_keep_their_letters():
    # Vowel signs of Thai and Devanagari, and syllables of Hangul, distinguish words.
    for one, other in (("กิน", "กัน"), ("कि", "कु"), ("가", "각")):
        assert canonical(one) != canonical(other)
    assert canonical(unicodedata.normalize("NFD", "é")) == canonical("é") == "e"
    assert canonical("рау", homoglyphs=False) == "рау"
    assert canonical("рау") == "pay"


def test_a_part_of_a_word_counts_where_that_is_asked_for():
    assert judged(begin(whole_words=False), ["a firebomb"])[-1].upto == 6


def test_only_what_may_become_a_match_is_withheld():
    judge = begin(patterns=PATTERNS[:1])
    assert judge.judge("hello bo", (), False).upto == 6
    assert judge.judge("y", (), False).upto == 9
    assert judge.judge("", (), False).upto == 9
    assert judge.judge(" 123", (), False).suspect_from == 10


def test_short_beginnings_may_be_released():
    rules = Rules(RuleSet(["bomb"]), min_beginning=3)
    judge = rules.begin(GuardRequest(request_id="r", side="answer"))
    assert [judge.judge(letter, (), False).upto for letter in "a bomb"] == [1, 2, 3, 4, 4, 4]
    verdict = judge.judge(" ", (), False)
    assert (verdict.action, verdict.upto) == (Action.STOP, 4)


def test_prompts_are_stopped_where_answers_are_replaced():
    assert judged(begin(action=Action.REPLACE, side="prompt"), ["a bomb"])[-1].action is Action.STOP


def test_an_escalation_names_its_span_and_the_search_continues():
    judge = begin(action=Action.ESCALATE)
    verdict = judge.judge("a bomb and ", (), False)
    assert (verdict.action, verdict.start, verdict.rule) == (Action.ESCALATE, 2, "bomb")
    assert judge.judge("on", (), True).action is Action.PASS


def test_matches_longer_than_the_limit_are_not_waited_for():
    judge = begin(words=(), patterns=(r"<.*>",), max_match_characters=10)
    assert judge.judge("<" + "a" * 30, (), False).upto >= 21


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "there are no rules"),
        ({"words": ["\u200b"]}, "has no visible character"),
        ({"patterns": ["a("]}, "is not valid"),
        ({"patterns": ["(a)\\1"]}, "no counterpart in RE2"),
        ({"patterns": ["(?=a)b"]}, "no counterpart in RE2"),
        ({"patterns": ["a*"]}, "matches the empty text"),
        ({"patterns": ["(a{999}){999}"]}, "RE2 cannot compile it"),
        ({"words_file": "/nowhere/words.txt"}, "cannot be read"),
    ],
)
def test_a_rule_that_cannot_work_is_a_sentence_at_start(tmp_path, options, message):
    file = tmp_path / "deploy.toml"
    lines = [f"{key} = {json.dumps(value)}" for key, value in options.items()]
    file.write_text("\n".join(['[guard]\nplugin = "rules"', *lines]))
    with pytest.raises(DeploymentError, match=message):
        resolve(file)


def test_rules_are_read_from_files(tmp_path):
    words = tmp_path / "words.txt"
    words.write_text("# a comment\n\nbomb\nsecret plan\n")
    guard = build_rules(RulesOptions(words=("more",), words_file=str(words)))
    for text in ("bomb", "secret plan", "more"):
        assert judged(guard.begin(GuardRequest(request_id="r", side="answer")), [text])[-1].action is Action.STOP


def test_what_is_kept_of_a_long_line_is_bounded():
    generator = random.Random(3)
    judge = begin(words=[f"word{i}bad" for i in range(5000)])
    for _ in range(40):
        judge.judge("".join(generator.choices("abcdé ", k=8192)), (), False)
        assert len(judge._text) <= 2 * judge._rules.num_kept + 8192
