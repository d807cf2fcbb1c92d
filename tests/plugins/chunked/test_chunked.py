from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_instant import PluginContext
from vllm_instant.deployment.errors import DeploymentError
from vllm_instant.deployment.resolved import engine_arguments, plugin_options
from vllm_instant.deployment.settings import resolve
from vllm_instant.interfaces.streaming import EngineLoad, PinLimits, PrefillOutcome, PrefillProgress, SessionLimits
from vllm_instant_plugins.chunked import plugin as chunked
from vllm_instant_plugins.chunked.policy import ChunkedPrefill

IDLE, FULL = EngineLoad(0, 8), EngineLoad(8, 8)
BUSY = EngineLoad(3, 8)


def policy(stall=0.06, early=0.1):
    return ChunkedPrefill(stall, early, SessionLimits())


@given(
    settled=st.integers(0, 5000),
    cached=st.integers(0, 5000),
    block=st.sampled_from([1, 8, 16, 32, 128]),
    running=st.integers(0, 9),
    token_seconds=st.floats(1e-6, 1.0),
)
def test_chunks_are_whole_blocks_of_the_settled_tokens(settled, cached, block, running, token_seconds):
    tested = policy()
    tested.observe(PrefillOutcome(100, 100 * token_seconds, IDLE))
    length = tested.next_chunk(PrefillProgress(settled, min(cached, settled), block), EngineLoad(running, 8))
    assert length <= settled
    if length > 0:
        assert length % block == 0
        assert length - min(cached, settled) // block * block >= 16


def test_an_idle_engine_prefills_everything_at_once_and_a_full_one_nothing():
    assert policy().next_chunk(PrefillProgress(700, 0, 32), IDLE) == 672
    assert policy().next_chunk(PrefillProgress(700, 0, 32), FULL) == 0
    assert policy().next_chunk(PrefillProgress(700, 672, 32), IDLE) == 0


def test_beside_running_requests_a_chunk_takes_at_most_the_allowed_stall():
    tested = policy(stall=0.1)
    assert tested.next_chunk(PrefillProgress(700, 64, 32), BUSY) == 96  # nothing is measured yet: the minimum
    for seconds in (0.1, 0.5, 0.9, 0.9):  # most of them waited for other work
        tested.observe(PrefillOutcome(100, seconds, BUSY))
    assert tested.next_chunk(PrefillProgress(700, 64, 32), BUSY) == 96
    for _ in range(40):
        tested.observe(PrefillOutcome(100, 0.1, BUSY))
    assert tested.next_chunk(PrefillProgress(700, 64, 32), BUSY) == 160
    assert tested.next_chunk(PrefillProgress(700, 64, 128), BUSY) == 128


def test_several_small_blocks_are_prefilled_at_a_time():
    assert policy().next_chunk(PrefillProgress(15, 0, 8), BUSY) == 0
    assert policy().next_chunk(PrefillProgress(100, 0, 8), BUSY) == 16


def test_answers_are_started_early_only_while_no_other_request_runs():
    assert policy().speculative_answer_delay() == 0.1
    assert policy().starts_speculative_answer(IDLE)
    assert not policy().starts_speculative_answer(BUSY)
    assert not policy().starts_speculative_answer(EngineLoad(0, 8, num_speculative=1))
    context = SimpleNamespace(max_model_len=1000)
    built = chunked._build(chunked.ChunkedOptions(early_answer_ms=0), context)
    assert built.speculative_answer_delay() is None


def test_the_limit_of_characters_follows_the_models_length():
    for options, length, expected in (({}, 1000, 32_000), ({}, 10**6, 10**6), ({"max_text_characters": 7}, 1000, 7)):
        built = chunked._build(chunked.ChunkedOptions(**options), SimpleNamespace(max_model_len=length))
        assert built.session_limits().max_text_characters == expected


def test_it_enables_the_prefix_cache_and_small_blocks_on_cpus(write_file):
    deployment = resolve(write_file('[streaming]\nplugin = "chunked"\nmax_sessions = 3\n'))
    arguments = engine_arguments(deployment)
    assert arguments["enable_prefix_caching"] is True
    assert arguments["block_size"] == 32  # this project's tests run on the CPU build
    assert plugin_options(deployment, "streaming").max_sessions == 3


def test_a_disabled_prefix_cache_is_refused(write_file):
    with pytest.raises(DeploymentError, match=r"which \[vllm\] enable_prefix_caching = false switches off"):
        resolve(write_file('[streaming]\nplugin = "chunked"\n[vllm]\nenable_prefix_caching = false\n'))


HELD = PinLimits(max_sessions=2, max_tokens=100, max_cache_share=0.5, idle_seconds=1.0)


def test_sessions_that_keep_their_blocks_are_prefilled_token_by_token():
    tested = ChunkedPrefill(0.06, None, SessionLimits(), HELD)
    assert tested.next_chunk(PrefillProgress(37, 33, 32, is_pinned=True), IDLE) == 37
    assert tested.next_chunk(PrefillProgress(34, 33, 32, is_pinned=True), IDLE) == 0
    assert tested.next_chunk(PrefillProgress(48, 33, 32, is_pinned=True), BUSY) == 0
    assert tested.next_chunk(PrefillProgress(60, 33, 32, is_pinned=True), BUSY) == 49
    assert tested.next_chunk(PrefillProgress(60, 33, 32, is_pinned=True), FULL) == 0
    assert tested.next_chunk(PrefillProgress(37, 33, 32), IDLE) == 0


class TestResumable:
    CONTEXT = PluginContext(
        model="m", max_model_len=512, max_num_seqs=8, vocab_size=100, num_speculative_tokens=0, device="cpu"
    )

    def test_by_default_a_quarter_of_max_num_seqs_keep_half_of_max_model_len(self):
        holds = chunked._build_resumable(chunked.ResumableOptions(), self.CONTEXT).pin_limits()
        assert (holds.max_sessions, holds.max_tokens, holds.max_cache_share, holds.idle_seconds) == (2, 256, 0.25, 30.0)

    def test_options_set_the_limits(self):
        options = chunked.ResumableOptions(
            held_sessions=3, held_tokens=64, held_seconds=5, held_cache_share=0.5, stall_ms=1, max_sessions=7
        )
        built = chunked._build_resumable(options, self.CONTEXT)
        holds = built.pin_limits()
        assert (holds.max_sessions, holds.max_tokens, holds.max_cache_share, holds.idle_seconds) == (3, 64, 0.5, 5.0)
        assert built.session_limits().max_sessions == 7

    def test_held_tokens_must_be_below_max_model_len(self):
        with pytest.raises(ValueError, match="held_tokens = 512 must be below max_model_len = 512"):
            chunked._build_resumable(chunked.ResumableOptions(held_tokens=512), self.CONTEXT)

    def test_chunked_keeps_no_blocks(self):
        assert chunked._build(chunked.ChunkedOptions(), self.CONTEXT).pin_limits() is None
