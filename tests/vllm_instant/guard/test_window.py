"""Nothing leaves a window that was not judged, beyond what its limits allow; and nothing is lost."""

import itertools
import weakref

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_instant.guard.window import FAILED_RULE, LATE_RULE, Limits, Window
from vllm_instant.interfaces.guard import Action, Late, Replacement, Verdict


def limits(late="wait", hold_tokens=3, hold_seconds=1.0, max_wait_seconds=10.0):
    return Limits(Late(late), hold_tokens, hold_seconds, max_wait_seconds)


def filled(window, *tokens, at=0.0):
    """Add tokens of these texts, one after the other."""
    for token in tokens:
        end = filled.ends.setdefault(window, 0) + len(token)
        filled.ends[window] = end
        window.extend(token, [end], at)
    return window


filled.ends = weakref.WeakKeyDictionary()


@pytest.fixture(autouse=True)
def _no_ends():
    filled.ends.clear()


# Tokens without text are the first bytes of a character, or special tokens.
TOKENS = st.lists(st.text(alphabet="ab é✨", max_size=4), min_size=1, max_size=12)


class Client:
    """Takes what a window releases, and checks each part."""

    def __init__(self, window, tokens, limits):
        self.window, self.limits = window, limits
        self.text = "".join(tokens)
        self.ends = list(itertools.accumulate(len(token) for token in tokens))
        self.got, self.tokens, self.judged, self.unjudged = "", [], 0, 0
        self.final = None

    def take(self, now):
        release = self.window.take(now)
        if release is None:
            return
        self.got += release.text
        self.tokens += release.tokens
        self.unjudged += release.num_unjudged
        self.final = release if release.is_final else None
        assert self.text.startswith(self.got)
        # Tokens come in order, once, and none whose text is still withheld.
        assert self.tokens == list(range(len(self.tokens)))
        assert all(self.ends[index] <= len(self.got) for index in self.tokens)
        # Tokens without text at the very end of an answer come with it.
        starts = [0, *self.ends]
        ahead = [index for index in self.tokens if self.ends[index] > max(self.judged, starts[index])]
        if self.limits.late is Late.RELEASE:
            assert len(ahead) <= self.limits.hold_tokens
            assert len(self.got) <= max([self.judged, *(self.ends[index] for index in ahead)])
        else:
            assert not ahead
            assert len(self.got) <= self.judged


@given(data=st.data(), tokens=TOKENS, late=st.sampled_from(list(Late)), is_streamed=st.booleans())
def test_only_judged_text_is_released(data, tokens, late, is_streamed):
    chosen = limits(late, hold_tokens=data.draw(st.integers(1, 4)))
    window = Window(chosen, is_streamed=is_streamed)
    client = Client(window, tokens, chosen)
    text, now, sent = client.text, 0.0, 0
    for _ in range(60):
        now += data.draw(st.sampled_from([0.0, 0.3, 1.0]))
        if sent < len(tokens) and data.draw(st.booleans()):
            window.extend(tokens[sent], [client.ends[sent]], now)
            sent += 1
            if sent == len(tokens):
                window.finish(now)
        reached = client.ends[sent - 1] if sent else 0
        client.judged = data.draw(st.integers(client.judged, max(client.judged, reached)))
        suspect = data.draw(st.none() | st.integers(client.judged, max(client.judged, len(text))))
        window.apply(Verdict(client.judged, suspect_from=suspect))
        client.take(now)
        if window.has_ended:
            break
    if late is Late.WAIT and not window.has_ended:
        for index in range(sent, len(tokens)):
            window.extend(tokens[index], [client.ends[index]], now)
        window.finish(now)
        client.judged = len(text)
        window.apply(Verdict(len(text)))
        client.take(now)
        if not client.final.is_stopped:
            assert (client.got, client.tokens) == (text, list(range(len(tokens))))


@given(data=st.data(), tokens=TOKENS)
def test_replaced_spans_take_their_tokens_along(data, tokens):
    text = "".join(tokens)
    ends = list(itertools.accumulate(len(token) for token in tokens))
    window = Window(limits())
    spans, position = [], 0
    while position < len(text) and data.draw(st.booleans()):
        start = data.draw(st.integers(position, len(text) - 1))
        position = data.draw(st.integers(start + 1, len(text)))
        spans.append(Replacement(start, position, "#"))
    got, kept, judged = "", [], 0
    for token, end in zip(tokens, ends, strict=True):
        window.extend(token, [end], 0.0)
        ready = [span for span in spans if judged < span.end <= end]
        # Text in which a span is not complete is not judged.
        upto = min([end, *(span.start for span in spans if span.start < end < span.end)])
        window.apply(Verdict(max(judged, upto), Action.REPLACE if ready else Action.PASS, replacements=ready))
        judged = max(judged, upto)
        if (release := window.take(0.0)) is not None:
            got, kept = got + release.text, kept + list(release.tokens)
    window.finish(0.0)
    release = window.take(0.0)
    got, kept = got + release.text, kept + list(release.tokens)
    expected, position = "", 0
    for span in spans:
        expected, position = expected + text[position : span.start] + "#", span.end
    assert got == expected + text[position:]
    starts = [0, *ends]
    overlap = {
        index for index, end in enumerate(ends) for span in spans if starts[index] < span.end and end > span.start
    }
    assert kept == [index for index in range(len(tokens)) if index not in overlap]


def test_text_is_released_when_it_is_judged():
    window = filled(Window(limits()), "one ", "two ")
    assert window.take(0.0) is None
    window.apply(Verdict(4))
    release = window.take(0.5)
    assert (release.text, list(release.tokens), release.delay) == ("one ", [0], 0.5)
    window.apply(Verdict(6))
    assert window.take(0.6) is None  # the token's text is not complete


def test_a_stop_ends_the_answer_before_the_violation():
    window = filled(Window(limits()), "fine ", "bad ")
    window.apply(Verdict(5, Action.STOP, rule="bad"))
    release = window.take(0.0)
    assert (release.text, list(release.tokens), release.is_final, release.is_stopped) == ("fine ", [0], True, True)
    assert release.rule == "bad"
    assert window.take(99.0) is None


def test_an_escalation_without_another_tier_stops_where_it_begins():
    window = filled(Window(limits()), "fine ", "odd ", "more")
    window.apply(Verdict(9, Action.ESCALATE, start=5))
    assert window.take(0.0).text == "fine "


def test_late_text_waits():
    window = filled(Window(limits("wait")), "a", "b")
    assert window.take(9.9) is None
    assert window.deadline() == 10.0
    release = window.take(10.0)
    assert (release.text, release.rule) == ("", LATE_RULE)


def test_late_text_is_released_as_far_as_the_window_reaches():
    window = filled(Window(limits("release")), "a", "b", "c", "d", "e")
    assert window.deadline() == 1.0
    assert window.take(0.9) is None
    release = window.take(1.0)
    assert (release.text, release.num_unjudged) == ("abc", 3)
    assert window.take(9.0) is None
    window.apply(Verdict(2))
    release = window.take(9.0)
    assert (release.text, release.num_unjudged) == ("de", 2)


def test_late_text_stops_the_answer():
    window = filled(Window(limits("stop")), "a", "b")
    window.apply(Verdict(1))
    assert window.take(0.5).text == "a"
    assert window.deadline() == 1.0
    release = window.take(1.0)
    assert (release.text, release.is_stopped, release.rule) == ("", True, LATE_RULE)


@pytest.mark.parametrize("late", list(Late))
def test_text_that_more_text_decides_about_is_not_late(late):
    window = filled(Window(limits(late)), "a", "b")
    window.apply(Verdict(1, suspect_from=1))
    assert window.take(0.0).text == "a"
    assert window.deadline() is None
    assert window.take(99.0) is None


@pytest.mark.parametrize(("late", "text"), [("release", "abcd"), ("wait", "a"), ("stop", "a")])
def test_a_failed_guard_does_what_late_says(late, text):
    window = filled(Window(limits(late)), "a", "b", "c", "d")
    window.apply(Verdict(1))
    window.fail()
    window.finish(0.0)
    release = window.take(0.0)
    assert (release.text, release.is_final, release.rule) == (text, True, "" if late == "release" else FAILED_RULE)


@pytest.mark.parametrize("late", list(Late))
def test_a_guard_that_fails_after_its_last_verdict_changes_nothing(late):
    window = filled(Window(limits(late)), "a")
    window.apply(Verdict(1))
    window.finish(0.0)
    window.fail()
    assert not window.take(0.0).is_stopped


def test_the_answer_waits_for_its_prompt():
    window = filled(Window(limits(), waits_for_prompt=True), "a")
    window.apply(Verdict(1))
    window.finish(0.0)
    assert window.take(5.0) is None
    window.prompt_passed()
    assert window.take(5.0).text == "a"


@pytest.mark.parametrize(("late", "ends"), [("release", 1.0), ("wait", 10.0), ("stop", 1.0)])
def test_an_empty_answer_waits_for_its_prompt_too(late, ends):
    window = Window(limits(late), waits_for_prompt=True)
    window.finish(0.0)
    assert window.take(ends - 0.1) is None
    assert window.deadline() == ends
    assert window.take(ends).is_stopped is (late != "release")


def test_an_answer_that_is_not_streamed_is_late_after_its_end_only():
    window = filled(Window(limits("stop"), is_streamed=False), "a")
    assert window.deadline() is None
    assert window.take(50.0) is None
    window.finish(50.0)
    assert window.deadline() == 51.0
    assert window.take(51.0).is_stopped


def test_an_answer_that_is_not_streamed_and_stopped_has_not_waited():
    window = filled(Window(limits(), is_streamed=False), "a", "b")
    window.apply(Verdict(1, Action.STOP, rule="b"))
    release = window.take(9.0)
    assert release.text == "a"
    assert release.delay == 0.0


def test_the_bytes_of_a_withheld_character_are_withheld():
    window = Window(limits())
    window.extend("a", [1], 0.0)
    window.extend("", [1, 1], 0.0)  # two of a character's bytes
    window.apply(Verdict(1))
    assert list(window.take(0.0).tokens) == [0]
    window.extend("✨", [2], 0.0)
    window.apply(Verdict(1, Action.STOP))
    assert list(window.take(0.0).tokens) == []


@pytest.mark.parametrize(("text", "is_structured"), [('x": "y', False), ("bad", True)])
def test_a_replacement_that_would_break_a_structure_stops_instead(text, is_structured):
    window = filled(Window(limits(), is_structured=is_structured), "ok ", text)
    end = 3 + len(text)
    window.apply(Verdict(end, Action.REPLACE, replacements=[Replacement(3, end, "***")], rule="r"))
    release = window.take(0.0)
    assert (release.text, release.is_stopped, release.rule) == ("ok ", True, "r")


def test_an_aborted_answer_gets_what_was_judged():
    window = filled(Window(limits("release")), "a", "b")
    window.apply(Verdict(1))
    release = window.abort(0.0)
    assert (release.text, release.is_final) == ("a", True)
    assert window.take(99.0) is None
