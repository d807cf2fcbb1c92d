"""Plugins that the tests need: budgets that vary, plugins that fail in every place where one can."""

import random

from vllm_instant import (
    Admission,
    Drafter,
    DrafterOptions,
    Plugin,
    PluginOptions,
    SchedulingPolicy,
    SpeculationPolicy,
    hookimpl,
)


class CyclingPolicy(SpeculationPolicy):
    """A different length for every request and step, 0 and the maximum included."""

    def __init__(self):
        self.step = 0

    def get_num_draft_tokens(self, step):
        self.step += 1
        if self.step % 7 == 0:
            return [0] * len(step.requests)
        return [(i + self.step) % (step.max_draft_tokens + 1) for i in range(len(step.requests))]


class BurstsPolicy(SpeculationPolicy):
    """One draft token in each step, or only in every twelfth step for requests that ask for bursts."""

    def __init__(self):
        self.step = 0

    def get_num_draft_tokens(self, step):
        self.step += 1
        return [1 if self.step % 12 == 0 or "bursts" not in r.extra_args else 0 for r in step.requests]


class RaisingPolicy(CyclingPolicy):
    """Works for some steps, then raises."""

    def get_num_draft_tokens(self, step):
        if self.step == 5:
            raise RuntimeError("policy failed on purpose")
        return super().get_num_draft_tokens(step)


class BackwardsOptions(PluginOptions):
    """What the tests of the batching patch turn."""

    max_num_admitted: int | None = None
    victim: str = ""
    prompt_tokens: int | None = None
    order: str = ""
    fail: bool = False


class Backwards(SchedulingPolicy):
    """The newest request first; for the rest as its options say."""

    def __init__(self, options):
        self.options = options
        self.asked = 0
        self.ended = []

    def admit(self, moment):
        self.asked += 1
        if self.options.fail:
            raise RuntimeError("batching failed on purpose")
        order = range(len(moment.waiting) - 1, -1, -1)
        if self.options.order:
            order = [int(place) for place in self.options.order.split(",")]
        return Admission(order, self.options.max_num_admitted)

    def preemption_order(self, running):
        return sorted(range(len(running)), key=lambda place: running[place].request_id == self.options.victim)

    def max_prompt_tokens(self, moment):
        return self.options.prompt_tokens

    def finished(self, request, now, complete):
        self.ended.append((request.request_id, request.num_output_tokens, complete))

    def metrics(self):
        return {"asked": self.asked}


class Shuffled(Backwards):
    """Any order, another one every time; any victims; prompts in small pieces."""

    def __init__(self):
        super().__init__(BackwardsOptions(prompt_tokens=24))
        self.random = random.Random(0)

    def admit(self, moment):
        order = list(range(len(moment.waiting)))
        self.random.shuffle(order)
        return Admission(order[: self.random.randrange(len(order) + 1)], self.random.choice([None, 1, 2]))

    def preemption_order(self, running):
        order = list(range(len(running)))
        self.random.shuffle(order)
        return order


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


class WatchedOptions(PluginOptions):
    """Where calls are written down."""

    calls: str


def watched_attention(options, context):
    from plain_attention import WatchedAttention

    return WatchedAttention(options.calls)


def sole_rotation(options, context):
    from sole_rotation import SoleRotation

    return SoleRotation()


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
        Plugin(
            slot="batching",
            name="backwards",
            summary="test",
            options=BackwardsOptions,
            build=lambda o, c: Backwards(o),
        ),
        Plugin(slot="batching", name="shuffled", summary="test", build=lambda o, c: Shuffled()),
        Plugin(slot="attention", name="plain", summary="test", lossy=True, build=plain_attention),
        Plugin(
            slot="attention",
            name="plain_watched",
            summary="test",
            lossy=True,
            options=WatchedOptions,
            build=watched_attention,
        ),
        Plugin(slot="attention", name="sole_rotation", summary="test", lossy=True, build=sole_rotation),
    ]
