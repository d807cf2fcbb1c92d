"""Drafters with one fault each are caught, and working ones are not."""

import itertools
import random

import numpy as np
import pytest

from vllm_instant import Draft, Drafter
from vllm_instant.deployment.plugin_manager import plugin_manager
from vllm_instant.interfaces.plugins import PluginContext
from vllm_instant.testing import ContractError, check_drafter

CONTEXT = PluginContext(
    model="", max_model_len=4096, max_num_seqs=8, vocab_size=200, num_speculative_tokens=5, device="cpu"
)


class Nothing(Drafter):
    def propose(self, requests):
        return [[] for _ in requests]


class Repeat(Drafter):
    def propose(self, requests):
        return [[int(r.token_ids[-1])] * r.max_draft_tokens for r in requests]


class Sure(Drafter):
    def propose(self, requests):
        return [Draft(r.token_ids[-1:], [0.5]) for r in requests]


@pytest.mark.parametrize("drafter", [Nothing, Repeat, Sure])
def test_correct_drafters_pass(drafter):
    check_drafter(drafter)


def test_the_suffix_drafter_passes():
    plugin = plugin_manager().get("drafter", "suffix").plugin
    check_drafter(lambda: plugin.build(plugin.options(), CONTEXT))


def test_the_suffix_drafter_that_searches_across_tenants_leaks():
    plugin = plugin_manager().get("drafter", "suffix").plugin
    options = plugin.options(across_tenants=True)
    check_drafter(lambda: plugin.build(options, CONTEXT), isolates_cache_salts=False)
    with pytest.raises(ContractError, match="tokens of a request with one cache_salt were proposed to another"):
        check_drafter(lambda: plugin.build(options, CONTEXT))


class ForgetsOne(Repeat):
    def propose(self, requests):
        return super().propose(requests)[1:]


class ReturnsNone(Drafter):
    def propose(self, requests):
        return [None for _ in requests]


class TooLong(Drafter):
    def propose(self, requests):
        return [[1] * (r.max_draft_tokens + 1) for r in requests]


class Floats(Drafter):
    def propose(self, requests):
        return [np.array([1.0]) for _ in requests]


class OutsideOfTheVocabulary(Drafter):
    def propose(self, requests):
        return [[200] for _ in requests]


class Negative(Drafter):
    def propose(self, requests):
        return [[-1] for _ in requests]


class Overconfident(Drafter):
    def propose(self, requests):
        return [Draft([1], [1.5]) for _ in requests]


class NotANumber(Drafter):
    def propose(self, requests):
        return [Draft([1], [float("nan")]) for _ in requests]


class ConfidenceMissing(Drafter):
    def propose(self, requests):
        return [Draft([1], []) for _ in requests]


class WritesTokens(Repeat):
    def propose(self, requests):
        drafts = super().propose(requests)
        requests[0].token_ids[0] += 1
        return drafts


class SortsRequests(Repeat):
    def propose(self, requests):
        requests.reverse()
        return super().propose(requests)


class Chance(Drafter):
    def propose(self, requests):
        return [[random.randrange(100)] for _ in requests]


class KeepsView(Drafter):
    """Proposes what stood at the end of the text in the step before, by a view that vLLM has overwritten since."""

    def __init__(self):
        self.views = {}

    def propose(self, requests):
        drafts = [self.views.get(r.request_id, r.token_ids)[-1:].tolist() for r in requests]
        self.views = {r.request_id: r.token_ids for r in requests}
        return drafts

    def forget(self, request_id):
        self.views.pop(request_id, None)


class NeverForgets(Repeat):
    def __init__(self):
        self.lengths = {}

    def propose(self, requests):
        self.lengths.update((r.request_id, len(r.token_ids)) for r in requests)
        return super().propose(requests)


class LogsForEver(Repeat):
    def __init__(self):
        self.log = []

    def forget(self, request_id):
        self.log.append(("ended", request_id))


class ForgetRaises(Repeat):
    def __init__(self):
        self.known = set()

    def propose(self, requests):
        self.known.update(r.request_id for r in requests)
        return super().propose(requests)

    def forget(self, request_id):
        self.known.remove(request_id)


class SharesText(Drafter):
    """Remembers what followed a token, across all requests."""

    def __init__(self):
        self.following = {}

    def propose(self, requests):
        drafts = []
        for r in requests:
            tokens = r.token_ids.tolist()
            self.following.update(itertools.pairwise(tokens))
            drafts.append([self.following[tokens[-1]]] if tokens[-1] in self.following else [])
        return drafts


@pytest.mark.parametrize(
    ("drafter", "message"),
    [
        (ForgetsOne, "must return one draft per request"),
        (ReturnsNone, "must be a sequence of token ids or a Draft, found None"),
        (TooLong, "got . tokens"),
        (Floats, "token ids must be integers, found .*1.0"),
        (OutsideOfTheVocabulary, "must lie in 0..199, found 200"),
        (Negative, "must lie in 0..199, found -1"),
        (Overconfident, "confidence must lie in 0..1, found 1.5"),
        (NotANumber, "confidence must lie in 0..1, found nan"),
        (ConfidenceMissing, "a Draft of 1 tokens must have as many confidences, found 0"),
        (WritesTokens, "wrote into token_ids"),
        (SortsRequests, "changed the sequence of requests"),
        (Chance, "proposed different tokens"),
        (KeepsView, "keep no view of token_ids"),
        (NeverForgets, r"is kept in NeverForgets.lengths"),
        (LogsForEver, r"is kept in LogsForEver.log\[…\]"),
        (SharesText, "tokens of a request with one cache_salt were proposed to another"),
    ],
)
def test_each_fault_is_named(drafter, message):
    with pytest.raises(ContractError, match=message):
        check_drafter(drafter)


def test_forget_must_accept_requests_that_never_drafted():
    with pytest.raises(KeyError):
        check_drafter(ForgetRaises)
