"""A drafter and a speculation policy in one file; copy it, rename it, and choose it by name in a deployment file."""

from pydantic import Field

from vllm_instant import Drafter, DrafterOptions, Plugin, PluginOptions, SpeculationPolicy, hookimpl


class BigramDrafter(Drafter):
    """Proposes what followed the last time that the request's two newest tokens stood side by side."""

    def propose(self, requests):
        """One list of draft tokens a request; empty where the pair is new."""
        return [self._continuation(r.token_ids, r.max_draft_tokens) for r in requests]

    def _continuation(self, tokens, length):
        if len(tokens) < 3:
            return []
        earlier = (tokens[:-2] == tokens[-2]) & (tokens[1:-1] == tokens[-1])
        hits = earlier.nonzero()[0]
        if not len(hits):
            return []
        start = hits[-1] + 2
        return tokens[start : start + length].tolist()


class ShyOptions(PluginOptions):
    """Options of the policy."""

    max_temperature: float = Field(0.5, ge=0, description="Draft only for requests up to this temperature.")


class ShyPolicy(SpeculationPolicy):
    """Full drafts for predictable requests, none for the others."""

    def __init__(self, options):
        self.max_temperature = options.max_temperature

    def get_num_draft_tokens(self, step):
        """Called before every step: one length a request."""
        return [step.max_draft_tokens if r.temperature <= self.max_temperature else 0 for r in step.requests]


@hookimpl
def instant_plugins():
    """What this distribution offers."""
    return [
        Plugin(slot="drafter", name="bigram", summary="repeats what followed the same two tokens before",
               options=DrafterOptions, build=lambda options, context: BigramDrafter()),
        Plugin(slot="speculation", name="shy", summary="drafts only for requests with low temperature",
               options=ShyOptions, build=lambda options, context: ShyPolicy(options)),
    ]  # fmt: skip
