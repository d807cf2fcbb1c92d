"""``suffix`` as a plugin: its options, and how it is built."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import AliasChoices, Field

from vllm_instant import DrafterOptions, Plugin, PluginContext
from vllm_instant_plugins.suffix.cache_salt_groups import CacheSaltGroups
from vllm_instant_plugins.suffix.drafter import SuffixDrafter

if TYPE_CHECKING:
    from vllm_instant_kernels.suffix_lookup import SuffixLookup
    from vllm_instant_plugins.suffix.device_drafter import SuffixDeviceDrafter


class SuffixOptions(DrafterOptions):
    """Options of ``suffix``."""

    num_speculative_tokens: int = Field(
        16, ge=1, le=128, description="Maximum number of draft tokens per request and step."
    )
    history_tokens: int = Field(
        1_000_000, ge=0, description="Tokens of ended requests' outputs that are searched as well; 0 for none."
    )
    share_across_cache_salts: bool = Field(
        False,
        validation_alias=AliasChoices("share_across_cache_salts", "across_tenants"),
        description="Search the outputs of all requests, not only of those with the same `cache_salt` (none without "
        "one); leaks text between clients.",
    )


def build(options: SuffixOptions, context: PluginContext) -> SuffixDrafter:
    """The drafter, with its compiled parts ready."""
    drafter = SuffixDrafter(context.max_model_len, options.history_tokens, options.share_across_cache_salts)
    drafter.warm_up()
    return drafter


def device_lookup(options: SuffixOptions, context: PluginContext) -> SuffixLookup:
    """The kernels of a lookup on the device, with their workspace."""
    from vllm_instant_kernels.suffix_lookup import SuffixLookup

    return SuffixLookup(
        context.max_num_seqs,
        context.max_model_len,
        context.num_speculative_tokens,
        options.history_tokens,
        context.device,
    )


def build_on_device(options: SuffixOptions, context: PluginContext) -> SuffixDeviceDrafter:
    """The drafter on the device, with its kernels compiled."""
    from vllm_instant_plugins.suffix.device_drafter import SuffixDeviceDrafter

    groups = CacheSaltGroups(options.share_across_cache_salts)
    drafter = SuffixDeviceDrafter(device_lookup(options, context), groups, context.device)
    drafter.warm_up()
    return drafter


PLUGIN = Plugin(
    slot="drafter",
    name="suffix",
    summary="tokens that followed the newest ones earlier, in the request or in other outputs; needs no draft model",
    options=SuffixOptions,
    build=build,
    build_on_device=build_on_device,
    confident=True,
    self_calibrating=True,
)
