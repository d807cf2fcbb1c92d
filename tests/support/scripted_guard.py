"""A guard service over vLLM's output processor without a model, and a guard whose verdicts a test gives."""

from __future__ import annotations

from prometheus_client import CollectorRegistry

from vllm_instant.deployment.circuit_breaker import GuardedPlugin
from vllm_instant.guard.metrics import GuardMetrics
from vllm_instant.guard.service import GuardService
from vllm_instant.interfaces.guard import Guard, GuardOptions, GuardRequest, TextJudge, Verdict
from vllm_instant_plugins.guard.plugin import RulesOptions, build_rules


class ByHand(Guard):
    """Passes nothing until the test says how far each text may go."""

    def __init__(self):
        self.judges: list[HandJudge] = []

    def begin(self, request: GuardRequest) -> TextJudge:
        self.judges.append(HandJudge(request))
        return self.judges[-1]

    def of(self, side):
        return next(judge for judge in reversed(self.judges) if judge.request.side == side)


class HandJudge(TextJudge):
    def __init__(self, request: GuardRequest):
        self.request = request
        self.text = ""
        self.verdict = Verdict(0)
        self.is_closed = False

    def judge(self, text, token_ids, is_finished):
        self.text += text
        return self.verdict

    def give(self, verdict: Verdict) -> None:
        self.verdict = verdict
        self.request.wake()

    def close(self):
        self.is_closed = True


def service(guard: Guard, options: GuardOptions | None = None, **named) -> GuardService:
    options = options or GuardOptions()
    guarded = GuardedPlugin("guard", "tested", guard)
    return GuardService(guarded, options, GuardMetrics("tested", CollectorRegistry()), **named)


def rules(**options) -> GuardService:
    chosen = RulesOptions(**{"words": ("bomb", "secret plan"), **options})
    return service(build_rules(chosen), chosen)
