"""Plugins that the tests need: budgets that vary, plugins that fail in every place where one can."""

import random

from vllm_instant import Drafter, DrafterOptions, Plugin, SpeculationPolicy, hookimpl


class CyclingPolicy(SpeculationPolicy):
    """A different length for every request and step, 0 and the maximum included."""

    def __init__(self):
        self.step = 0

    def draft_lengths(self, step):
        self.step += 1
        if self.step % 7 == 0:
            return [0] * len(step.requests)
        return [(i + self.step) % (step.max_draft_tokens + 1) for i in range(len(step.requests))]


class BurstsPolicy(SpeculationPolicy):
    """One draft token in each step, or only in every twelfth step for requests that ask for bursts."""

    def __init__(self):
        self.step = 0

    def draft_lengths(self, step):
        self.step += 1
        return [1 if self.step % 12 == 0 or "bursts" not in r.extra_args else 0 for r in step.requests]


class RaisingPolicy(CyclingPolicy):
    """Works for some steps, then raises."""

    def draft_lengths(self, step):
        if self.step == 5:
            raise RuntimeError("policy failed on purpose")
        return super().draft_lengths(step)


class RandomDrafter(Drafter):
    """Hopeless drafts."""

    def __init__(self, vocab_size):
        self.vocab_size = vocab_size
        self.random = random.Random(0)

    def propose(self, requests):
        return [[self.random.randrange(self.vocab_size) for _ in range(r.max_draft_tokens)] for r in requests]


class RaisingDrafter(RandomDrafter):
    """Works for some steps, then returns too much, which is a violation and not only an exception."""

    calls = 0

    def propose(self, requests):
        self.calls += 1
        return super().propose(requests) if self.calls < 6 else [[1] * 99 for _ in requests]


def planted(name):
    def build(options, context):
        import planted_samplers

        return getattr(planted_samplers, name)()

    return build


def plain_attention(options, context):
    from plain_attention import PlainAttention

    return PlainAttention()


def cannot_start(options, context):
    raise OSError("the model of this policy is not there")


def incomplete(options, context):
    return object()


@hookimpl
def instant_plugins():
    return [
        Plugin(slot="speculation", name="cycling", summary="test", build=lambda o, c: CyclingPolicy()),
        Plugin(slot="speculation", name="bursts", summary="test", build=lambda o, c: BurstsPolicy()),
        Plugin(slot="speculation", name="raising", summary="test", build=lambda o, c: RaisingPolicy()),
        Plugin(slot="speculation", name="cannot_start", summary="test", build=cannot_start),
        Plugin(slot="speculation", name="incomplete", summary="test", lossy=True, build=incomplete),
        Plugin(
            slot="drafter",
            name="random",
            summary="test",
            options=DrafterOptions,
            build=lambda o, c: RandomDrafter(c.vocab_size),
        ),
        Plugin(
            slot="drafter",
            name="raising",
            summary="test",
            options=DrafterOptions,
            build=lambda o, c: RaisingDrafter(c.vocab_size),
        ),
        *(
            Plugin(slot="rejection_sampler", name=plugin, summary="test", build=planted(name))
            for plugin, name in (
                ("accept_always", "AcceptAlways"),
                ("wrong_residual", "WrongResidual"),
                ("off_by_one", "OffByOne"),
                ("raising", "Raising"),
                ("out_of_range", "OutOfRange"),
            )
        ),
        Plugin(slot="attention", name="plain", summary="test", lossy=True, build=plain_attention),
        Plugin(slot="experts", name="unserved", summary="test", lossy=True, build=incomplete),
    ]
