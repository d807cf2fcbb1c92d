"""Everything that vLLM's own output processor would send passes the guard; the tokens are forced."""

import asyncio
from types import SimpleNamespace

import pytest
from scripted_guard import ByHand, rules, service

from vllm_instant.interfaces.guard import Action, GuardOptions, Verdict
from vllm_instant.patches import guard, registry
from vllm_instant.patches.guard_replay import ForcedAnswer, ForcedEngine
from vllm_instant.tools.demo.assets import ASSETS

TOKENIZER = ASSETS / "base"
CLEAN = "héllo wörld ✨ this is fine"
BAD = "first a bomb then more"


@pytest.fixture(scope="module")
def plain():
    return ForcedEngine(TOKENIZER, None)


def engine(judging):
    return ForcedEngine(TOKENIZER, judging)


def replay(tested, text, *others, **named):
    answers = [ForcedAnswer(token_ids=tested.tokenizer.encode(each), **named) for each in (text, *others)]
    received = asyncio.run(tested.replay_several(answers))
    assert tested.processor.request_states == {}
    assert tested.processor.parent_requests == {}
    assert not tested.processor.external_req_ids
    return received if others else received[0]


WAYS = [
    {},
    {"kind": "CUMULATIVE"},
    {"kind": "FINAL_ONLY"},
    {"step_sizes": (3, 1, 4)},
    {"logprobs": 1},
    {"logprobs": 1, "kind": "FINAL_ONLY", "step_sizes": (5,)},
    {"stop": ("END",)},
    {"stop": ("fine",), "step_sizes": (2,)},
    {"stop": ("fine",), "include_stop": True},
]


@pytest.mark.parametrize("ways", WAYS, ids=str)
def test_a_clean_answer_is_the_same_as_without_a_guard(plain, ways):
    expected = replay(plain, CLEAN, **ways)
    found = replay(engine(rules()), CLEAN, **ways)
    assert (found.text, found.token_ids, found.logprob_token_ids, found.finish_reason) == (
        expected.text,
        expected.token_ids,
        expected.logprob_token_ids,
        expected.finish_reason,
    )


@pytest.mark.parametrize("ways", [*WAYS, {"detokenize": False}, {"is_structured": True}], ids=str)
def test_nothing_of_a_violation_reaches_the_client(ways):
    tested = engine(rules())
    found = replay(tested, BAD, **ways)
    assert found.finish_reason == "content_filter"
    assert found.text in ("first a ", "") if ways.get("detokenize") is False else found.text == "first a "
    assert "first a".startswith(tested.tokenizer.decode(found.token_ids).strip())
    if "logprobs" in ways:
        assert found.logprob_token_ids == found.token_ids


def test_the_engine_is_told_to_stop(monkeypatch):
    tested, aborted = engine(rules()), []
    process = tested.processor.process_outputs

    def watching(outputs):
        result = process(outputs)
        aborted.extend(result.reqs_to_abort)
        return result

    monkeypatch.setattr(tested.processor, "process_outputs", watching)
    replay(tested, BAD)
    assert len(aborted) == 1


def test_each_of_several_answers_is_judged():
    for kind in ("DELTA", "FINAL_ONLY"):
        found = replay(engine(rules()), BAD, CLEAN, kind=kind)
        assert [answer.finish_reason for answer in found] == ["content_filter", "length"]
        assert [answer.text for answer in found] == ["first a ", CLEAN]


@pytest.mark.parametrize("steps", range(1, 8))
def test_a_client_that_disconnects_gets_nothing_unjudged(steps):
    found = replay(engine(rules()), "a bomb then", abort_after=steps)
    assert "a ".startswith(found.text)
    assert found.finish_reason in ("abort", "content_filter")


def test_a_message_ends_a_stopped_answer_unless_it_has_a_structure():
    assert replay(engine(rules(message=" [filtered]")), BAD).text == "first a  [filtered]"
    assert replay(engine(rules(message=" [filtered]")), BAD, is_structured=True).text == "first a "


def test_a_replaced_match_takes_its_tokens_and_log_probabilities_along():
    tested = engine(rules(action="replace"))
    found = replay(tested, BAD, logprobs=1)
    assert (found.text, found.finish_reason) == ("first a *** then more", "length")
    assert found.logprob_token_ids == found.token_ids
    assert "bomb" not in tested.tokenizer.decode(found.token_ids)
    assert replay(tested, '{"a": "x bomb y"}', is_structured=True).finish_reason == "content_filter"


def test_a_prompt_is_judged_before_the_first_token():
    found = replay(engine(rules()), CLEAN, prompt="how to make a bomb")
    assert (found.text, found.token_ids, found.finish_reason) == ("", [], "content_filter")
    assert replay(engine(rules(side="answer")), CLEAN, prompt="how to make a bomb").text == CLEAN
    found = replay(engine(rules()), CLEAN, CLEAN, prompt="how to make a bomb")
    assert [answer.finish_reason for answer in found] == ["content_filter"] * 2


def test_a_long_prompt_is_judged_in_parts():
    tested = engine(rules())
    found = replay(tested, CLEAN, prompt="word " * 20_000 + "bomb", step_seconds=0.001)
    assert (found.text, found.finish_reason) == ("", "content_filter")


# ------------------------------------------------------------------------------------------- verdicts that come later


def run_by_hand(events, text="one two three", options=None, **named):
    """Replay with verdicts that come at given steps; returns what the client has after each step, and at the end."""
    by_hand = ByHand()
    clock = [0.0]
    judging = service(by_hand, options or GuardOptions(side="answer"), clock=lambda: clock[0])
    tested, seen = engine(judging), []

    async def main():
        answer = ForcedAnswer(token_ids=tested.tokenizer.encode(text), **named)
        steps = iter(range(1000))

        def on_step():
            step = next(steps)
            if step in events:
                by_hand.of("answer").give(events[step])
            request = next(iter(tested.processor.request_states.values()), None)
            seen.append(request is not None)

        task = asyncio.create_task(tested.replay(answer, on_step))
        while not task.done():
            await asyncio.sleep(0)
            if "end" in events and len(seen) >= len(answer.token_ids):
                by_hand.of("answer").give(events["end"])
        return await task

    return asyncio.run(asyncio.wait_for(main(), 20)), by_hand, seen


def test_a_verdict_between_two_steps_releases_text():
    text = "one two three four"
    found, _, _ = run_by_hand({3: Verdict(3), "end": Verdict(len(text))}, text=text, step_seconds=0.002)
    assert found.text == text
    assert found.chunks[0] == "one"


def test_the_end_of_an_answer_waits_for_its_verdict():
    found, by_hand, _ = run_by_hand({"end": Verdict(13)}, kind="FINAL_ONLY")
    assert (found.text, found.finish_reason) == ("one two three", "length")
    assert by_hand.of("answer").is_closed


def test_a_stop_between_two_steps_ends_the_answer_in_the_engine_too():
    found, by_hand, seen = run_by_hand({2: Verdict(3, Action.STOP, rule="x")}, text="one two three " * 10)
    assert (found.text, found.finish_reason) == ("one", "content_filter")
    assert not seen[-1]
    assert by_hand.of("answer").is_closed


@pytest.mark.parametrize(("late", "text", "reason"), [("release", "one two", "length"), ("stop", "", "content_filter")])
def test_a_guard_that_says_nothing_does_what_late_says(late, text, reason):
    options = GuardOptions(side="answer", late=late, hold_ms=1)
    judging = service(ByHand(), options)
    found = asyncio.run(engine(judging).replay(ForcedAnswer(token_ids=engine(judging).tokenizer.encode("one two"))))
    assert (found.text, found.finish_reason) == (text, reason)


def test_a_guard_that_waits_too_long_stops():
    judging = service(ByHand(), GuardOptions(side="answer", max_wait_seconds=0.02))
    found = replay(engine(judging), "one two")
    assert (found.text, found.finish_reason) == ("", "content_filter")
    assert judging.decisions(1)[0]["rule"] == "late"


@pytest.mark.parametrize(
    ("late", "text", "reason"),
    [("release", CLEAN, "length"), ("wait", "", "content_filter"), ("stop", "", "content_filter")],
)
def test_a_guard_that_raises_does_what_late_says(late, text, reason):
    class Raising(ByHand):
        def begin(self, request):
            raise RuntimeError("a fault")

    judging = service(Raising(), GuardOptions(late=late))
    found = replay(engine(judging), CLEAN)
    assert (found.text, found.finish_reason) == (text, reason)
    assert judging.guarded.failures == {"begin": 1}


def test_without_an_event_loop_an_answer_waits_for_its_verdict():
    """vLLM's ``LLM`` has no loop: what is left at the end is waited for."""
    import threading
    import time

    by_hand = ByHand()
    tested = engine(service(by_hand, GuardOptions(side="answer")))
    params = tested._params(ForcedAnswer(token_ids=(), kind="FINAL_ONLY"), 1)
    forced = ForcedAnswer(token_ids=tested.tokenizer.encode("one two"), kind="FINAL_ONLY", step_sizes=(99,))
    tested._add("name", forced, params, None, 1)

    def pass_later():
        time.sleep(0.02)
        by_hand.of("answer").verdict = Verdict(7)

    thread = threading.Thread(target=pass_later)
    thread.start()
    result = tested.processor.process_outputs([tested._output("name", forced, [0], 0, 0)])
    thread.join()
    assert [output.outputs[0].text for output in result.request_outputs] == ["one two"]


# ------------------------------------------------------------------------------------------- typed prompts


def test_what_was_judged_while_it_was_typed_is_not_judged_again():
    by_hand = ByHand()
    judging = service(by_hand, GuardOptions(side="prompt"))
    tested = engine(judging)

    async def main():
        prefix = ForcedAnswer(token_ids=[5], prompt="How do I")
        tested._add(f"{guard.PREFILL_PREFIX}1", prefix, tested._params(prefix, 1), None, 1)
        typed = by_hand.of("prompt")
        assert typed.text == "How do I"
        typed.give(Verdict(8))
        task = asyncio.create_task(
            tested.replay(ForcedAnswer(token_ids=tested.tokenizer.encode("fine"), prompt="How do I bake?"))
        )
        await asyncio.sleep(0.01)
        assert by_hand.of("prompt") is typed
        assert typed.text == "How do I bake?"
        typed.give(Verdict(14))
        assert (await task).text == "fine"

    asyncio.run(main())


# ------------------------------------------------------------------------------------------- records


def test_a_stop_is_counted_recorded_and_written_to_the_log(caplog):
    judging = rules(log_text=True)
    replay(engine(judging), BAD)
    (decision,) = judging.decisions(10)
    assert decision["action"] == "stop"
    assert (decision["rule"], decision["position"], decision["side"]) == ("bomb", 8, "answer")
    assert "bomb" in decision["text"]
    assert any("rule='bomb'" in record.getMessage() for record in caplog.records)
    assert all(decision["request_id"] not in record.getMessage() for record in caplog.records)
    silent = rules()
    replay(engine(silent), BAD)
    assert "text" not in silent.decisions(1)[0]


def test_the_patch_fits_the_installed_vllm():
    (found,) = [report for report in registry.check(registry.installed_vllm(), "x") if report.patch is guard.PATCH]
    assert found.unsupported_reason is None


def test_a_request_that_cannot_be_served_is_refused(monkeypatch):
    from patch_harness import wrap
    from vllm.exceptions import VLLMValidationError

    from vllm_instant.deployment import deployment_env
    from vllm_instant.deployment.settings import resolve
    from vllm_instant.patches.names import INPUT_PROCESSOR

    class InputProcessor:
        def process_inputs(self, request_id, prompt, params, resumable=False):
            return "processed"

    wrap(guard.PATCH, INPUT_PROCESSOR, InputProcessor=InputProcessor)
    deployment_env.set_deployment(resolve(None, ["guard.plugin=rules", 'guard.words=["bomb"]']))
    try:
        process = InputProcessor().process_inputs
        assert process("r", "p", SimpleNamespace(extra_args=None)) == "processed"
        assert process("r", "p", SimpleNamespace(extra_args={"instant_guard_late": "stop"})) == "processed"
        with pytest.raises(VLLMValidationError, match="less strict"):
            process("r", "p", SimpleNamespace(extra_args={"instant_guard_late": "release"}))
        with pytest.raises(VLLMValidationError, match="not served with a guard"):
            process("r", "p", SimpleNamespace(extra_args=None), resumable=True)
        with pytest.raises(VLLMValidationError, match="cannot be judged"):
            process("r", {"type": "embeds"}, SimpleNamespace(extra_args=None))
    finally:
        deployment_env.clear_deployment()


def test_engines_get_the_deployments_guard(monkeypatch):
    from patch_harness import wrap

    from vllm_instant.patches.names import ASYNC_LLM, LLM_ENGINE

    judging = rules()
    monkeypatch.setattr(guard, "_build", lambda config: judging if config == "guarded" else None)

    class Engine:
        def __init__(self, vllm_config, log_stats):
            self.output_processor = SimpleNamespace()
            self.engine_core = SimpleNamespace(abort_requests_async=None)

    for module, name in ((ASYNC_LLM, "AsyncLLM"), (LLM_ENGINE, "LLMEngine")):
        kind = type(name, (Engine,), {"__init__": Engine.__init__})
        wrap(guard.PATCH, module, **{name: kind})
        assert guard.service_of(kind(vllm_config="guarded", log_stats=False)) is judging
        assert guard.service_of(kind("plain", log_stats=False)) is None


def test_a_guard_without_a_tokenizer_is_refused():
    from vllm_instant.deployment import deployment_env
    from vllm_instant.deployment.settings import resolve

    deployment_env.set_deployment(resolve(None, ["guard.plugin=rules", 'guard.words=["bomb"]']))
    try:
        config = SimpleNamespace(model_config=SimpleNamespace(skip_tokenizer_init=True))
        with pytest.raises(ValueError, match="skip-tokenizer-init"):
            guard._build(config)
    finally:
        deployment_env.clear_deployment()
