"""A drafter and a speculation policy in one file, each chosen by its name in a deployment file."""

from pydantic import Field

from vllm_instant import Drafter, DrafterOptions, Plugin, PluginOptions, SpeculationPolicy, hookimpl


class BigramDrafter(Drafter):
    """Proposes what followed the two newest tokens when they last stood side by side."""

    def propose(self, requests):
        """Return one list of draft tokens per request; it is empty where the pair is new."""
        return [self._continuation(r.token_ids, r.max_draft_tokens) for r in requests]

    def _continuation(self, tokens, length):
        if len(tokens) < 3:
            return []
        earlier = (tokens[:-2] == tokens[-2]) & (tokens[1:-1] == tokens[-1])
        places = earlier.nonzero()[0]
        if not len(places):
            return []
        start = places[-1] + 2
        return tokens[start : start + length].tolist()


class ShyOptions(PluginOptions):
    """Options of the policy."""

    max_temperature: float = Field(0.5, ge=0, description="Highest temperature at which a request gets draft tokens.")


class ShyPolicy(SpeculationPolicy):
    """All draft tokens for requests with a low temperature, none for the others."""

    def __init__(self, options):
        self.max_temperature = options.max_temperature

    def get_num_draft_tokens(self, step):
        """Return one number of draft tokens per request."""
        return [step.max_draft_tokens if r.temperature <= self.max_temperature else 0 for r in step.requests]


@hookimpl
def instant_plugins():
    """Return the plugins of this distribution."""
    return [
        Plugin(slot="drafter", name="bigram", summary="what followed the two newest tokens before",
               options=DrafterOptions, build=lambda options, context: BigramDrafter()),
        Plugin(slot="speculation", name="shy", summary="draft tokens for requests with a low temperature",
               options=ShyOptions, build=lambda options, context: ShyPolicy(options)),
    ]  # fmt: skip
