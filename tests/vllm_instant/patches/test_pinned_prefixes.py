"""Held prefixes in vLLM's own scheduler classes, without a model or a device."""

import pytest
import scheduler_harness as harness

from vllm_instant.deployment import deployment_env
from vllm_instant.deployment.settings import resolve
from vllm_instant.patches.pinned_prefixes import HOLD, PinningMixin
from vllm_instant.patches.scheduler import create_scheduler

pytestmark = pytest.mark.engine
SIZE = harness.BLOCK_SIZE


@pytest.fixture(params=[False, True], ids=["synchronous", "asynchronous"])
def make(request, demo_pair, monkeypatch):
    """A scheduler with prefix caching and ``blocks`` KV blocks."""

    monkeypatch.setattr(PinningMixin, "instant_pinning_fits", True)

    def build(blocks=200, places=4):
        monkeypatch.setenv(deployment_env.VARIABLE, "")
        monkeypatch.setenv("VLLM_RAY_EXTRA_ENV_VARS_TO_COPY", "")
        deployment_env.set_deployment(resolve(None, ("speculation.plugin=fixed",)))
        config = harness.engine_config(demo_pair.target, 0, places, request.param)
        config.cache_config.enable_prefix_caching = True
        config.cache_config.num_gpu_blocks = blocks
        return harness.make_scheduler(create_scheduler, config)

    return build


def request_of(name, number, tokens, max_tokens=1, salt=None):
    """A request of a session; prompts given by their length are beginnings of one text."""
    from vllm.sampling_params import SamplingParams
    from vllm.utils.hashing import sha256
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher
    from vllm.v1.request import Request

    return Request(
        request_id=f"request-{number}",
        prompt_token_ids=text(tokens) if isinstance(tokens, int) else tokens,
        sampling_params=SamplingParams(
            max_tokens=max_tokens, ignore_eos=True, extra_args={HOLD: name} if name else None
        ),
        pooling_params=None,
        block_hasher=get_request_block_hasher(SIZE, sha256),
        cache_salt=salt,
    )


def text(tokens):
    return [i % 4000 + 2 for i in range(tokens)]


def run(scheduler, request, steps=1):
    """Add a request and let it go on; returns what its first step was given."""
    scheduler.add_request(request)
    first = None
    for _ in range(steps):
        output = scheduler.schedule()
        scheduler.get_grammar_bitmask(output)
        reading = {i for i in output.num_scheduled_tokens if scheduler.requests[i].is_prefill_chunk}
        scheduler.update_from_output(output, harness.answer(output, {}, reading))
        first = first or output
    return first


def used(scheduler):
    pool = scheduler.kv_cache_manager.block_pool
    return pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()


def test_the_next_request_of_a_session_goes_on_inside_a_block(make):
    scheduler = make()
    assert scheduler.instant_hold("s", 4, 500, 0.5) is None
    run(scheduler, request_of("s", 0, SIZE + 9))
    assert used(scheduler) == 2
    output = run(scheduler, request_of("s", 1, SIZE + 20))
    assert output.num_scheduled_tokens == {"request-1": 11}
    [new] = output.scheduled_new_reqs
    assert new.num_computed_tokens == SIZE + 9
    # What it writes goes into a copy: the session may be edited and need the block as it was.
    [copy] = output.kv_cache_block_copies
    assert copy.dst_block_id == new.block_ids[0][1]
    scheduler.instant_let_go("s")
    run(scheduler, request_of(None, 2, 4))
    assert used(scheduler) == 0


def test_without_a_session_only_whole_blocks_are_found(make):
    scheduler = make()
    scheduler.instant_hold("s", 4, 500, 0.5)
    run(scheduler, request_of("s", 0, SIZE + 9))
    assert run(scheduler, request_of(None, 1, SIZE + 20)).num_scheduled_tokens == {"request-1": 20}
    assert run(scheduler, request_of("stranger", 2, SIZE + 20)).num_scheduled_tokens == {"request-2": 20}


def test_another_salt_finds_nothing(make):
    scheduler = make()
    scheduler.instant_hold("s", 4, 500, 0.5)
    run(scheduler, request_of("s", 0, SIZE + 9, salt="mine"))
    assert run(scheduler, request_of("s", 1, SIZE + 20, salt="yours")).num_scheduled_tokens == {"request-1": SIZE + 20}


def test_an_edit_goes_on_from_where_the_texts_part(make):
    scheduler = make()
    scheduler.instant_hold("s", 4, 500, 0.5)
    run(scheduler, request_of("s", 0, SIZE + 9))
    edited = [*text(SIZE + 4), *[3999] * 10]
    assert run(scheduler, request_of("s", 1, edited)).num_scheduled_tokens == {"request-1": 10}


def test_an_answer_is_held_for_the_next_turn(make):
    scheduler = make()
    scheduler.instant_hold("s", 4, 500, 0.5)
    run(scheduler, request_of("s", 0, 9, max_tokens=6), steps=6)
    turn = [*text(9), *[5] * 6, *[7] * 3]
    # The answer's last token was sampled, not computed.
    assert run(scheduler, request_of("s", 1, turn)).num_scheduled_tokens == {"request-1": 4}


def test_held_blocks_are_given_back_before_anybody_waits(make):
    scheduler = make(blocks=11)  # ten, and the null block
    scheduler.instant_hold("s", 4, 500, 0.9)
    run(scheduler, request_of("s", 0, 6 * SIZE - 1))
    assert used(scheduler) == 6
    scheduler.add_request(request_of(None, 1, [3] * (8 * SIZE)))
    assert scheduler.schedule().num_scheduled_tokens == {"request-1": 8 * SIZE}
    assert scheduler.instant_pinned.num_blocks == 0


def test_an_aborted_answer_leaves_no_block_behind(make):
    from vllm.v1.request import RequestStatus

    scheduler = make()
    scheduler.instant_hold("s", 4, 500, 0.5)
    run(scheduler, request_of("s", 0, SIZE + 9, max_tokens=50), steps=3)
    scheduler.finish_requests("request-0", RequestStatus.FINISHED_ABORTED)
    scheduler.instant_let_go("s")
    scheduler.schedule()  # blocks that a step in flight may write to come back a step later
    assert used(scheduler) == 0


def test_new_weights_make_what_is_held_worthless(make):
    scheduler = make()
    scheduler.instant_hold("s", 4, 500, 0.5)
    run(scheduler, request_of("s", 0, SIZE + 9))
    assert scheduler.reset_prefix_cache()
    assert run(scheduler, request_of("s", 1, SIZE + 20)).num_scheduled_tokens == {"request-1": SIZE + 20}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda scheduler: setattr(scheduler, "connector", object()), "a KV connector is configured"),
        (lambda scheduler: setattr(scheduler, "use_eagle", True), "(EAGLE)"),
    ],
    ids=["connector", "EAGLE"],
)
def test_reasons_not_to_hold(make, change, reason):
    scheduler = make()
    change(scheduler)
    assert reason in scheduler.instant_hold("s", 4, 500, 0.5)


def test_not_on_a_vllm_that_is_different(make, monkeypatch):
    scheduler = make()
    monkeypatch.setattr(PinningMixin, "instant_pinning_fits", False)
    assert "vllm-instant doctor" in scheduler.instant_hold("s", 4, 500, 0.5)


def test_no_more_sessions_than_allowed(make):
    scheduler = make()
    assert scheduler.instant_hold("s", 1, 500, 0.5) is None
    assert scheduler.instant_hold("t", 1, 500, 0.5) == "the limit of sessions with a pinned prefix is reached"


def test_a_prefix_with_pictures_or_vectors_is_neither_pinned_nor_used():
    """The same token ids stand for other pictures."""
    from types import SimpleNamespace

    from vllm_instant.patches.pinned_prefixes import _session_of

    sampling = SimpleNamespace(extra_args={HOLD: "session"})
    plain = SimpleNamespace(sampling_params=sampling, mm_features=[], prompt_embeds=None)
    assert _session_of(plain) == "session"
    assert _session_of(SimpleNamespace(**{**vars(plain), "mm_features": ["a picture"]})) is None
    assert _session_of(SimpleNamespace(**{**vars(plain), "prompt_embeds": object()})) is None
