"""Beam search, and the status of stopped responses; vLLM's classes are stand-ins."""

import asyncio
from types import SimpleNamespace

import pytest
from patch_harness import wrap
from scripted_guard import ByHand, rules, service

from vllm_instant.interfaces.guard import GuardOptions, Verdict
from vllm_instant.patches import guard, guard_whole
from vllm_instant.patches.guard import INTERNAL, PROCESSOR_ATTRIBUTE, STOPPED, OutputGuard


def searched(judging, *texts, prompt="a prompt"):
    """The output of a beam search with these sequences."""
    internal = []

    class BeamSearchOnlineMixin:
        def __init__(self):
            processor = SimpleNamespace(tokenizer=None)
            if judging is not None:
                setattr(processor, PROCESSOR_ATTRIBUTE, OutputGuard(judging, processor, None))
            self.engine_client = SimpleNamespace(output_processor=processor)

        async def beam_search(self, request_id):
            await asyncio.create_task(self.ask())
            parts = [
                SimpleNamespace(
                    text=text,
                    token_ids=[1],
                    logprobs=[2],
                    cumulative_logprob=-1.0,
                    finish_reason="length",
                    stop_reason=None,
                )
                for text in texts
            ]
            yield SimpleNamespace(request_id=request_id, prompt=prompt, prompt_token_ids=None, outputs=parts)

        async def ask(self):
            internal.append(INTERNAL.get())

    wrap(guard_whole.PATCH, guard_whole._BEAM_MODULE, BeamSearchOnlineMixin=BeamSearchOnlineMixin)

    async def run():
        found = [output async for output in BeamSearchOnlineMixin().beam_search(request_id="r")]
        assert not INTERNAL.get()
        return found

    (output,) = asyncio.run(run())
    assert internal == [judging is not None]
    return output.outputs


def test_sequences_are_judged_whole():
    clean, bad = searched(rules(message="!"), "a clean one", "then a bomb here")
    assert (clean.text, clean.token_ids, clean.finish_reason) == ("a clean one", [1], "length")
    assert (bad.text, bad.finish_reason) == ("then a !", "content_filter")
    assert (bad.token_ids, bad.logprobs, bad.cumulative_logprob) == ([], None, None)


def test_a_replaced_match_leaves_no_tokens():
    (found,) = searched(rules(action="replace"), "a bomb here")
    assert (found.text, found.token_ids, found.finish_reason) == ("a *** here", [], "length")


def test_the_prompt_is_judged_too():
    (found,) = searched(rules(), "fine", prompt="make a bomb")
    assert (found.text, found.finish_reason) == ("", "content_filter")


def test_a_late_verdict_is_waited_for():
    by_hand = ByHand()
    judging = service(by_hand, GuardOptions(side="answer"))
    begin = by_hand.begin

    def later(request):
        judge = begin(request)
        asyncio.get_running_loop().call_later(0.01, judge.give, Verdict(4))
        return judge

    by_hand.begin = later
    (found,) = searched(judging, "fine")
    assert found.text == "fine"


def test_without_a_guard_nothing_changes():
    (found,) = searched(None, "a bomb")
    assert (found.text, found.token_ids) == ("a bomb", [1])


@pytest.mark.parametrize(("status", "expected"), [("completed", "incomplete"), ("cancelled", "cancelled")])
def test_a_stopped_response_is_incomplete(status, expected):
    class ResponsesResponse:
        status, incomplete_details = "", None

        @classmethod
        def from_request(cls, request, status):
            found = cls()
            found.status = status
            return found

    wrap(guard_whole.PATCH, guard_whole._RESPONSES_MODULE, ResponsesResponse=ResponsesResponse)
    STOPPED.append("resp_1_0")
    try:
        found = ResponsesResponse.from_request(SimpleNamespace(request_id="resp_1"), status=status)
        other = ResponsesResponse.from_request(SimpleNamespace(request_id="resp_2"), status=status)
    finally:
        STOPPED.remove("resp_1_0")
    assert found.status == expected
    assert other.status == status
    if expected == "incomplete":
        assert found.incomplete_details.reason == "content_filter"


def test_both_patches_belong_to_the_slot():
    assert guard.PATCH.slots == guard_whole.PATCH.slots == ("guard",)
