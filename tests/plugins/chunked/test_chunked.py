import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_instant import EngineLoad, PrefillOutcome, PrefillProgress, SessionLimits
from vllm_instant.problems import DeploymentError
from vllm_instant.settings import resolve
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
def test_chunks_are_whole_blocks_of_what_is_settled(settled, cached, block, running, token_seconds):
    tested = policy()
    tested.observe(PrefillOutcome(100, 100 * token_seconds, IDLE))
    length = tested.next_chunk(PrefillProgress(settled, min(cached, settled), block), EngineLoad(running, 8))
    assert length <= settled
    if length > 0:
        assert length % block == 0
        assert length - min(cached, settled) // block * block >= 16


def test_an_idle_engine_reads_everything_at_once_and_a_full_one_nothing():
    assert policy().next_chunk(PrefillProgress(700, 0, 32), IDLE) == 672
    assert policy().next_chunk(PrefillProgress(700, 0, 32), FULL) == 0
    assert policy().next_chunk(PrefillProgress(700, 672, 32), IDLE) == 0


def test_beside_others_a_chunk_takes_no_longer_than_they_may_wait():
    tested = policy(stall=0.1)
    assert tested.next_chunk(PrefillProgress(700, 64, 32), BUSY) == 96  # nothing is known yet: the least
    for seconds in (0.1, 0.5, 0.9, 0.9):  # most of them waited for something else
        tested.observe(PrefillOutcome(100, seconds, BUSY))
    assert tested.next_chunk(PrefillProgress(700, 64, 32), BUSY) == 96
    for _ in range(40):
        tested.observe(PrefillOutcome(100, 0.1, BUSY))
    assert tested.next_chunk(PrefillProgress(700, 64, 32), BUSY) == 160
    assert tested.next_chunk(PrefillProgress(700, 64, 128), BUSY) == 128


def test_small_blocks_are_read_several_at_a_time():
    assert policy().next_chunk(PrefillProgress(15, 0, 8), BUSY) == 0
    assert policy().next_chunk(PrefillProgress(100, 0, 8), BUSY) == 16


def test_answers_are_begun_early_only_for_nobody_elses_harm():
    assert policy().early_after() == 0.1
    assert policy().starts_early(IDLE)
    assert not policy().starts_early(BUSY)
    assert not policy().starts_early(EngineLoad(0, 8, ahead=1))
    assert chunked._build(chunked.ChunkedOptions(early_answer_ms=0), None).early_after() is None


def test_it_brings_the_prefix_cache_and_on_cpus_small_blocks(write_file):
    deployment = resolve(write_file('[streaming]\nplugin = "chunked"\nmax_sessions = 3\n'))
    arguments = deployment.engine_arguments()
    assert arguments["enable_prefix_caching"] is True
    assert arguments["block_size"] == 32  # this project's tests run on the CPU build
    assert deployment.options("streaming").max_sessions == 3


def test_without_prefix_cache_there_is_nothing_to_read_into(write_file):
    with pytest.raises(DeploymentError, match=r"which \[vllm\] enable_prefix_caching = false switches off"):
        resolve(write_file('[streaming]\nplugin = "chunked"\n[vllm]\nenable_prefix_caching = false\n'))
