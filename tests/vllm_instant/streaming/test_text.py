import pytest
from fake_streaming import tokenizers_by_kind
from hypothesis import example, given
from hypothesis import strategies as st
from streaming_texts import TEXTS

from vllm_instant.streaming.text import MAX_TAIL, TextBuffer, TextError, common_length, stable_prefix_length


@pytest.mark.parametrize("kind", ["demo", "split", "words"])
@given(text=TEXTS, more=TEXTS)
@example(text="so I don'", more="t know")
@example(text="one two 12", more="34 five")
@example(text="caf and e", more="\u0301 more")
@example(text="two  ", more=" spaces")
@example(text="a\n \n", more="\n b")
def test_the_stable_prefix_has_the_same_tokens_whatever_follows(kind, text, more):
    tokenizer = tokenizers_by_kind()[kind]

    def ids(some):
        return tokenizer.encode(some, add_special_tokens=False).ids

    settled = ids(text[: stable_prefix_length(text)])
    sent = settled[: common_length(settled, ids(text))]
    assert ids(text + more)[: len(sent)] == sent


def test_all_but_the_last_words_is_stable():
    assert stable_prefix_length("") == 0
    assert stable_prefix_length("Hello") == 0
    assert stable_prefix_length("Why is the sky") == len("Why is the")
    assert stable_prefix_length("Why is the sky ") == len("Why is the ")
    assert stable_prefix_length("e\u0301e\u0301 ok") == 4  # marks stay with their letters


def test_text_without_boundaries_is_stable_far_before_its_end():
    assert stable_prefix_length("字" * 1000) == 1000 - MAX_TAIL
    assert stable_prefix_length("字" * MAX_TAIL) == 0


EDITS = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60), TEXTS), max_size=12)


@given(edits=EDITS)
def test_edits_change_exactly_their_characters(edits):
    buffer = TextBuffer(10_000)
    expected: list[str] = []
    for one, other, text in edits:
        start, end = sorted((min(one, len(expected)), min(other, len(expected))))
        buffer.replace(start, end, text)
        expected[start:end] = list(text)
        assert buffer.text == "".join(expected)


def test_an_edit_outside_of_the_text_or_beyond_its_limit_changes_nothing():
    buffer = TextBuffer(5)
    buffer.append("four")
    with pytest.raises(TextError, match="has 4 characters: found start 3 and end 9"):
        buffer.replace(3, 9, "")
    with pytest.raises(TextError, match="at most 5 characters; this one would have 6"):
        buffer.append("ab")
    assert buffer.text == "four"
    buffer.replace(3, None, "rs")
    assert buffer.text == "fours"
