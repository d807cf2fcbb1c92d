"""What an engine core keeps of a request that has ended: nothing that its client sent."""

import gc
import time
import weakref

from vllm_instant import RequestState, StepOutcome, UpcomingStep
from vllm_instant.scheduling.request_registry import RequestRegistry
from vllm_instant_plugins.goodput.policy import GoodputPolicy

USERS, WAVES = 8, 40


class Sent(dict):
    """What a client sent."""


def test_what_clients_sent_goes_with_the_request_whatever_a_policy_keeps():
    registry, policy = RequestRegistry(), GoodputPolicy(4, USERS, clock=time.monotonic)
    sent, step = [], 0
    for wave in range(WAVES):
        states = []
        for user in range(USERS):
            extra = Sent(tenant="x" * 1000)
            sent.append(weakref.ref(extra))
            name = f"{wave}/{user}"
            states.append(RequestState(name, 40, 8, 0.0, prompt_token_ids=[wave, user] * 20, extra_args=extra))
            del extra
            registry.admit(states[-1])
            policy.enter(states[-1])
        for _ in range(4):
            step += 1
            lengths = policy.get_num_draft_tokens(UpcomingStep(states, 4, number=step))
            rows = USERS + sum(lengths)
            policy.observe(StepOutcome(states, list(lengths), [0] * USERS, rows, 0.02, USERS, step + 1))
        assert len([one for one in sent if one() is not None]) == USERS
        for state in states:
            registry.forget(state.request_id)
            policy.forget(state.request_id)
        del state, states
        gc.collect()
        assert not any(one() is not None for one in sent)
    # The policy explains decisions about all of these requests still.
    explained = policy.decisions(4 * WAVES)
    assert len(explained) > 3 * WAVES
    assert registry.states == {}
