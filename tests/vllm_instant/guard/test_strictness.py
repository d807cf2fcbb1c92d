"""A request may be stricter than its server, and never laxer."""

import pytest

from vllm_instant.guard.strictness import strictness_of
from vllm_instant.interfaces.guard import GuardOptions, Late


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"instant_guard_late": "release"}, "less strict than this server's wait"),
        ({"instant_guard_late": "never"}, "must be one of release, wait, stop"),
        ({"instant_guard_late": 3}, "must be one of"),
        ({"instant_guard_hold_tokens": 17}, "from 1 to this server's 16"),
        ({"instant_guard_hold_tokens": 0}, "from 1 to"),
        ({"instant_guard_hold_tokens": True}, "from 1 to"),
        ({"instant_guard_hold_tokens": 2.5}, "from 1 to"),
        ({"instant_guard_side": "prompt"}, "leaves out what this server judges"),
        ({"instant_guard_side": "none"}, "must be one of prompt, answer, both"),
    ],
)
def test_what_is_laxer_or_not_valid_is_a_sentence(given, message):
    with pytest.raises(ValueError, match=message):
        strictness_of(GuardOptions(side="answer" if "side" in str(given) else "both"), given)


def test_a_request_may_be_stricter():
    options = GuardOptions(late="release", side="answer")
    found = strictness_of(
        options, {"instant_guard_late": "stop", "instant_guard_hold_tokens": 2, "instant_guard_side": "both"}
    )
    assert (found.limits.late, found.limits.hold_tokens) == (Late.STOP, 2)
    assert found.judges("prompt")
    assert found.judges("answer")
    plain = strictness_of(options, {"other": 1})
    assert (plain.limits.late, plain.limits.hold_tokens, plain.limits.hold_seconds) == (Late.RELEASE, 16, 0.05)
    assert not plain.judges("prompt")
