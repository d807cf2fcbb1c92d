import asyncio
from contextlib import asynccontextmanager

import pytest
import virtual_time
from fake_streaming import Eager, FakeEngine, hosting
from hypothesis import given, settings
from hypothesis import strategies as st
from streaming_texts import TEXTS

from vllm_instant.interfaces.streaming import PinLimits, PrefillProgress
from vllm_instant.streaming.events import EventError, check
from vllm_instant.streaming.session import Session


@asynccontextmanager
async def session_on(engine, plugin=None, request=None):
    """A configured session, its events, and its manager."""
    heard = []

    async def send(event):
        heard.append(event)

    with hosting(engine, plugin, clock=virtual_time.clock) as host:
        number = host.enter("me")
        session = Session(host, number, send)
        try:
            await session.handle(check({"type": "session.update", "session": request or {"model": "m"}}))
            yield session, heard, host
        finally:
            await session.close()
            host.leave(number)


async def put(session, start, end, text):
    await session.handle(check({"type": "input_text.replace", "start": start, "end": end, "text": text}))


async def append(session, text):
    await session.handle(check({"type": "input_text.append", "text": text}))


async def until(condition, seconds=5.0):
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.001)


async def committed(session):
    await session.handle(check({"type": "input_text.commit"}))
    await session.finished()


def words_of(heard):
    return "".join(
        choice["delta"].get("content", "")
        for event in heard
        if event["type"] == "response.chunk"
        for choice in event["chunk"]["choices"]
    )


CHUNKS = st.lists(st.tuples(TEXTS, st.integers(0, 5)), max_size=10)


@given(chunks=CHUNKS, kind=st.sampled_from(["demo", "split", "words"]))
@settings(max_examples=60)
def test_prefilled_tokens_are_a_prefix_of_the_final_prompt(chunks, kind):
    async def run():
        engine = FakeEngine(kind)
        system = [{"role": "system", "content": "Be brief, please."}]
        async with session_on(engine, request={"model": "m", "messages": system}) as (session, heard, _):
            for text, pauses in chunks:
                await append(session, text)
                for _ in range(pauses):
                    await asyncio.sleep(0)
            await asyncio.sleep(0.001)
            await committed(session)
            whole = engine.ids({"messages": [*system, {"role": "user", "content": "".join(t for t, _ in chunks)}]})
            assert words_of(heard) == f"{len(whole)} tokens"
            for prefix in engine.prefilled:
                assert whole[: len(prefix)] == prefix

    virtual_time.run(run())


@given(edits=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40), TEXTS, st.integers(0, 3)), max_size=8))
@settings(max_examples=60)
def test_the_prompt_that_is_answered_is_that_of_the_edited_text(edits):
    async def run():
        engine, expected = FakeEngine(), ""
        async with session_on(engine) as (session, _, _):
            for one, other, text, pauses in edits:
                start, end = sorted((min(one, len(expected)), min(other, len(expected))))
                await put(session, start, end, text)
                expected = expected[:start] + text + expected[end:]
                for _ in range(pauses):
                    await asyncio.sleep(0)
            await committed(session)
            assert engine.answered[-1]["messages"] == [{"role": "user", "content": expected}]

    virtual_time.run(run())


LONG = "Why is the sky blue when the sun is yellow and the night is black? " * 4


def test_the_system_prompt_is_prefilled_before_the_first_character():
    async def run():
        engine = FakeEngine()
        messages = [{"role": "system", "content": LONG}, {"role": "user", "content": "a"}]
        async with session_on(engine, request={"model": "m", "messages": messages}):
            await until(lambda: engine.prefilled)
            assert len(engine.prefilled[-1]) > len(engine.ids({"messages": messages[:1]})) - 4

    virtual_time.run(run())


def test_after_an_edit_in_the_middle_the_rest_is_prefilled_again():
    async def run():
        engine = FakeEngine()
        async with session_on(engine) as (session, heard, _):
            await append(session, LONG)
            await until(lambda: engine.prefilled)
            first = engine.prefilled[-1]
            await put(session, 40, 45, "violet")
            await until(lambda: engine.prefilled[-1][: len(first)] != first)
            whole = engine.ids({"messages": [{"role": "user", "content": LONG[:40] + "violet" + LONG[45:]}]})
            assert whole[: len(engine.prefilled[-1])] == engine.prefilled[-1]
            await until(lambda: heard[-1] == {"type": "input_text.prefilled", "tokens": len(engine.prefilled[-1])})

    virtual_time.run(run())


def test_the_next_prompt_follows_the_answer():
    async def run():
        engine = FakeEngine()
        async with session_on(engine) as (session, heard, _):
            await append(session, "One?")
            await committed(session)
            assert heard[-1]["type"] == "response.done"
            assert heard[-1]["status"] == "completed"
            said = words_of(heard)
            await append(session, "Two?")
            await committed(session)
            assert [m["content"] for m in engine.answered[-1]["messages"]] == ["One?", said, "Two?"]

    virtual_time.run(run())


def test_a_request_that_fails_leaves_the_text_as_it_was():
    async def run():
        engine = FakeEngine(max_tokens=20)
        async with session_on(engine) as (session, heard, _):
            await append(session, LONG)
            await committed(session)
            assert heard[-1]["status"] == "failed"
            assert heard[-1]["error"]["message"].startswith("the prompt has ")
            await put(session, 3, None, "")
            await committed(session)
            assert engine.answered[-1]["messages"][-1]["content"] == "Why"
            assert heard[-1]["status"] == "completed"

    virtual_time.run(run())


def test_a_full_engine_gets_no_chunk_until_it_has_capacity():
    async def run():
        engine = FakeEngine()
        engine.running = engine.slots
        async with session_on(engine) as (session, _, _):
            await append(session, LONG)
            await asyncio.sleep(0.05)
            assert not engine.prefilled
            engine.running = 0
            await until(lambda: engine.prefilled)

    virtual_time.run(run())


def test_sessions_take_turns():
    async def run():
        engine = FakeEngine()

        async def send(event):
            pass

        with hosting(engine, Eager(prefills_in_flight=1)) as host:
            sessions = [Session(host, number, send) for number in range(5)]
            for session in sessions:
                await session.handle(check({"type": "session.update", "session": {"model": "m"}}))
                await append(session, LONG)
            await until(lambda: len(engine.prefilled) == 5)
            assert engine.max_at_once == 1
            for session in sessions:
                await session.close()

    virtual_time.run(run())


def test_a_commit_does_not_wait_for_a_chunk():
    async def run():
        engine = FakeEngine()
        engine.prefill_gate.clear()
        async with session_on(engine) as (session, heard, _):
            await append(session, LONG)
            await until(lambda: engine.at_once == 1)
            await asyncio.wait_for(committed(session), 2)
            assert heard[-1]["status"] == "completed"
            assert engine.stopped == 1

    virtual_time.run(run())


def test_a_speculative_answer_is_used_if_the_prompt_ended_there():
    async def run():
        engine = FakeEngine()
        async with session_on(engine, Eager(pause=0.01)) as (session, heard, host):
            await append(session, "Well?")
            await until(lambda: engine.answered)
            await committed(session)
            assert len(engine.answered) == 1
            assert words_of(heard).endswith(" tokens")
            assert host.metrics.speculative_answers.labels("used")._value.get() == 1

    virtual_time.run(run())


@pytest.mark.parametrize("then", ["more text", "another request", "nothing"])
def test_a_speculative_answer_is_discarded_if_the_prompt_continues(then):
    async def run():
        engine = FakeEngine()
        async with session_on(engine, Eager(pause=0.01)) as (session, heard, _):
            engine.answer_gate.clear()
            await append(session, "Well?")
            await until(lambda: engine.open_answers == 1)
            if then == "more text":
                await append(session, " No:")
            elif then == "another request":
                await session.handle(check({"type": "session.update", "session": {"model": "m", "seed": 1}}))
            await until(lambda: engine.open_answers == 0 or len(engine.answered) == 2)
            assert not words_of(heard)
            engine.answer_gate.set()
            await committed(session)
            text = "Well? No:" if then == "more text" else "Well?"
            assert engine.answered[-1]["messages"][-1]["content"] == text
            assert ("seed" in engine.answered[-1]) == (then == "another request")
            assert len([e for e in heard if e["type"] == "response.done"]) == 1

    virtual_time.run(run())


def test_a_speculative_answer_is_delayed_while_other_requests_run():
    async def run():
        engine = FakeEngine()
        engine.running = 1
        async with session_on(engine, Eager(pause=0.001)) as (session, _, _):
            await append(session, "Well?")
            await asyncio.sleep(0.01)
            assert not engine.answered
            engine.running = 0
            await until(lambda: engine.answered)

    virtual_time.run(run())


def test_no_speculative_answer_starts_while_other_requests_run():
    async def run():
        engine = FakeEngine()
        engine.running = 1
        async with session_on(engine, Eager(pause=0.005)) as (session, _, _):
            await append(session, "Well?")
            await asyncio.sleep(0.05)
            assert not engine.answered

    virtual_time.run(run())


@pytest.mark.parametrize("moment", ["reading", "answering", "early"])
def test_closing_releases_everything_at_once(moment):
    async def run():
        engine = FakeEngine()
        async with session_on(engine, Eager(pause=0.005 if moment == "early" else None)) as (session, _, host):
            engine.answer_gate.clear()
            if moment == "reading":
                engine.prefill_gate.clear()
            await append(session, LONG)
            if moment == "reading":
                await until(lambda: engine.at_once == 1)
            elif moment == "answering":
                await session.handle(check({"type": "input_text.commit"}))
                await until(lambda: engine.open_answers == 1)
            else:
                await until(lambda: engine.open_answers == 1)
            await session.close()
            assert engine.at_once == engine.open_answers == 0
            assert not host.prefill_slots.locked()

    virtual_time.run(run())


def test_cancelling_aborts_the_answer_and_the_session_continues():
    async def run():
        engine = FakeEngine()
        async with session_on(engine) as (session, heard, _):
            engine.answer_gate.clear()
            await append(session, "One?")
            await session.handle(check({"type": "input_text.commit"}))
            with pytest.raises(EventError, match="not complete"):
                await session.handle(check({"type": "input_text.commit"}))
            await until(lambda: engine.open_answers == 1)
            await session.handle(check({"type": "response.cancel"}))
            assert engine.open_answers == 0
            assert heard[-1] == {"type": "response.done", "status": "cancelled"}
            engine.answer_gate.set()
            await append(session, "Two?")
            await committed(session)
            assert [m["content"] for m in engine.answered[-1]["messages"]] == ["Two?"]

    virtual_time.run(run())


def test_a_session_needs_a_model_that_exists():
    async def run():
        async def send(event):
            pass

        with hosting(FakeEngine()) as host:
            session = Session(host, 1, send)
            with pytest.raises(EventError, match=r"session\.update first"):
                await session.handle(check({"type": "input_text.commit"}))
            with pytest.raises(EventError, match="does not exist"):
                await session.handle(check({"type": "session.update", "session": {"model": "missing"}}))
            await session.close()

    virtual_time.run(run())


def test_a_plugin_that_fails_disables_only_the_prefill():
    class Broken(Eager):
        def next_chunk(self, progress: PrefillProgress, load):
            raise ValueError("no")

    async def run():
        engine = FakeEngine()
        async with session_on(engine, Broken()) as (session, heard, _):
            await append(session, LONG)
            await committed(session)
            assert not engine.prefilled
            assert heard[-1]["status"] == "completed"

    virtual_time.run(run())


HOLDS = PinLimits(max_sessions=4, max_tokens=1000, max_cache_share=0.25, idle_seconds=60.0)


def test_all_requests_of_a_pinned_session_name_it_and_its_end_unpins_it():
    async def run():
        engine = FakeEngine()
        async with session_on(engine, Eager(pause=0.01, holds=HOLDS)) as (session, _, host):
            await append(session, LONG)
            await until(lambda: engine.answered)  # begun early
            await append(session, "And at night, why is it black then? Does anyone know that?")
            await committed(session)
            assert engine.holding == [session.id]
            assert len(engine.held_for) >= 3
            assert set(engine.held_for) == {session.id}
            assert host.metrics.pinned._value.get() == 1
        assert engine.holding == []
        assert host.metrics.pinned._value.get() == 0

    virtual_time.run(run())


def test_without_new_text_a_session_is_unpinned():
    async def run():
        engine = FakeEngine()
        holds = PinLimits(max_sessions=4, max_tokens=1000, max_cache_share=0.25, idle_seconds=0.05)
        async with session_on(engine, Eager(holds=holds)) as (session, _, _):
            await append(session, LONG)
            await until(lambda: engine.holding)
            await until(lambda: not engine.holding)
            await append(session, LONG)
            await until(lambda: engine.holding)

    virtual_time.run(run())


def test_a_session_that_ends_while_it_is_pinned_is_unpinned():
    async def run():
        engine = FakeEngine()
        async with session_on(engine, Eager(holds=HOLDS)) as (session, _, host):
            engine.hold_gate.clear()
            await append(session, LONG)
            await until(lambda: engine.holding)
            await session.close()
            await until(lambda: not engine.holding)
            assert host.metrics.pinned._value.get() == 0

    virtual_time.run(run())


def test_without_pinning_prompts_are_prefilled_through_the_prefix_cache(caplog):
    async def run():
        engine = FakeEngine()
        engine.unsupported_reason = "a KV connector is configured"
        async with session_on(engine, Eager(holds=HOLDS)) as (session, heard, host):
            await append(session, LONG)
            await until(lambda: engine.prefilled)
            assert not await host.pin("another session")
            await committed(session)
            assert words_of(heard).endswith("tokens")
        assert set(engine.held_for) == {None}

    virtual_time.run(run())
    assert (
        caplog.text.count("The KV blocks of a session are not pinned between chunks: a KV connector is configured") == 1
    )


def test_the_plugin_knows_which_prompts_are_pinned():
    told = []

    class Curious(Eager):
        def next_chunk(self, progress, load):
            told.append(progress.is_pinned)
            return super().next_chunk(progress, load)

    async def run():
        for holds in (None, HOLDS):
            async with session_on(FakeEngine(), Curious(holds=holds)) as (session, _, _):
                await append(session, LONG)
                await until(lambda: told)
            assert set(told) == {holds is not None}
            told.clear()

    virtual_time.run(run())


def test_a_commit_right_after_the_last_words_finds_the_engine_idle():
    async def run():
        engine = FakeEngine()
        async with session_on(engine) as (session, _, _):
            await append(session, LONG)
            await until(lambda: engine.prefilled)
            await asyncio.sleep(0.02)
            chunks = len(engine.held_for)
            for _ in range(3):
                await append(session, LONG)
                await asyncio.sleep(0)
            await committed(session)
            assert len(engine.held_for) == chunks + 1, "the answer, and no chunk before it"

    virtual_time.run(run())


@pytest.mark.parametrize("steps", range(8))
@pytest.mark.parametrize(
    "plugin",
    [Eager(), Eager(pause=5.0), Eager(holds=HOLDS)],
    ids=["reads", "early", "holds"],
)
def test_a_session_can_be_closed_at_any_step_of_its_typing(steps, plugin):
    """Text sent just before a connection closes is handled in the same iteration of the event loop."""

    async def run():
        async with session_on(FakeEngine(), plugin) as (session, _, _):
            await append(session, "what has been typed. ")
            await asyncio.sleep(0.05)
            await append(session, "and ")
            for _ in range(steps):
                await asyncio.sleep(0)
            async with asyncio.timeout(2):
                await session.close()

    virtual_time.run(run())
