"""Drafts of clients reach the request whose key they name, and no other."""

from types import SimpleNamespace

import pytest

from vllm_instant.deployment import deployment_env
from vllm_instant.deployment.settings import resolve
from vllm_instant.interfaces.drafter import PushedTail
from vllm_instant.patches.client_drafts import ClientDraftsMixin
from vllm_instant.patches.engine_core import instant_push_drafts
from vllm_instant.speculation.draft_plan import DraftPlan
from vllm_instant.speculation.pushed_drafts import KEY, MAX_TAILS, PushedDrafts, draft_key_of

MINE, OTHER = "m" * 16, "o" * 16


def row(branch):
    return [branch, 0, 0, 0, [7], b""]


def test_drafts_reach_the_request_with_their_key_at_its_next_step():
    drafts = PushedDrafts()
    drafts.admit("mine", {KEY: MINE})
    drafts.admit("other", {KEY: OTHER})
    drafts.admit("none", None)
    drafts.push({MINE: [row(0), row(1)], "unknown" * 3: [row(9)]})
    assert drafts.take(["other", "none"]) == {}
    assert drafts.take(["mine", "other"]) == {"mine": (PushedTail(*row(0)), PushedTail(*row(1)))}
    assert drafts.take(["mine"]) == {}


def test_of_two_requests_with_one_key_the_first_has_the_drafts():
    drafts = PushedDrafts()
    drafts.admit("first", {KEY: MINE})
    drafts.admit("second", {KEY: MINE})
    drafts.push({MINE: [row(0)]})
    assert drafts.take(["first", "second"]).keys() == {"first"}
    drafts.forget("second")
    drafts.push({MINE: [row(0)]})
    drafts.forget("first")
    assert drafts.take(["first"]) == {}
    drafts.push({MINE: [row(0)]})
    assert vars(drafts) == vars(PushedDrafts())


def test_only_the_newest_tails_wait():
    drafts = PushedDrafts()
    drafts.admit("mine", {KEY: MINE})
    for branch in range(50):
        drafts.push({MINE: [row(branch)]})
    assert [tail.branch for tail in drafts.take(["mine"])["mine"]] == list(range(50 - MAX_TAILS, 50))


@pytest.mark.parametrize("key", ["short", "x" * 129, 5, ["x" * 20], True])
def test_a_key_is_a_string_of_some_length(key):
    with pytest.raises(ValueError, match=r"instant_draft_key must be a string of 16 to 128 characters$"):
        draft_key_of({KEY: key})
    drafts = PushedDrafts()
    drafts.admit("mine", {KEY: key})
    assert vars(drafts) == vars(PushedDrafts())


class Base:
    """As much of vLLM's scheduler as the mixin extends."""

    def __init__(self):
        self.known = []

    def add_request(self, request):
        self.known.append(request.request_id)

    def _free_request(self, request):
        self.known.remove(request.request_id)
        return "freed"


class Scheduler(ClientDraftsMixin, Base):
    """The mixin over it."""


@pytest.mark.parametrize("switched_on", [True, False])
def test_the_scheduler_adds_drafts_to_the_plan_of_a_step(write_file, monkeypatch, switched_on):
    option = "client_drafts = true" if switched_on else 'url = "ws://127.0.0.1:1"'
    deployment = resolve(write_file(f'[drafter]\nplugin = "remote"\n{option}\n'))
    monkeypatch.setattr(deployment_env, "get_deployment", lambda: deployment)
    scheduler = Scheduler()
    request = SimpleNamespace(request_id="mine", sampling_params=SimpleNamespace(extra_args={KEY: MINE}))
    scheduler.add_request(request)
    scheduler.add_request(SimpleNamespace(request_id="pooling", sampling_params=None))
    instant_push_drafts(SimpleNamespace(scheduler=scheduler), {MINE: [row(0)]})
    plan = DraftPlan({"mine": 3})
    pushed = scheduler.instant_with_pushed(plan).pushed
    assert pushed == ({"mine": (PushedTail(*row(0)),)} if switched_on else {})
    assert scheduler.instant_with_pushed(plan) is plan
    assert scheduler._free_request(request) == "freed"
    assert scheduler.known == ["pooling"]
    # Another scheduler than ours takes none.
    instant_push_drafts(SimpleNamespace(scheduler=object()), {MINE: [row(0)]})
