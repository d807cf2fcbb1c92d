"""Pinned KV-cache prefixes of streaming sessions (``scheduling.pinned_prefixes``), in vLLM's scheduler.

A pinned prefix is offered to the session's next request where vLLM looks for a prefix-cache hit. It may end inside a
block: vLLM copies such a block before the request writes to it. So no request waits inside the engine between chunks;
vLLM's own resumable requests do, and they can starve or end an engine.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm_instant.patches.compat import HasAttribute, HasSignature, References, VllmPatch
from vllm_instant.patches.names import SCHEDULER
from vllm_instant.scheduling.pinned_prefixes import PinnedPrefixes

if TYPE_CHECKING:
    from vllm.v1.request import Request

HOLD = "instant_hold"
"""In a request's ``extra_args``: the session whose pinned prefix it uses, and for which its own blocks are pinned."""


class PinningMixin:
    """Pins prefixes for sessions; precedes vLLM's scheduler in the bases of a class."""

    instant_pinning_fits = False
    """Whether the installed vLLM is one that this patch fits; set when the patch is activated in this process."""

    # Attributes of the vLLM base class.
    kv_cache_manager: Any
    connector: Any
    use_eagle: bool

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.instant_pinned: PinnedPrefixes | None = None
        self._instant_pinned_share = 0.0

    def instant_hold(self, name: str, sessions: int, tokens: int, share: float) -> str | None:
        """Let a session pin its prefix; returns the reason of a refusal, or None.

        Args:
            name: the session.
            sessions: limit of the number of sessions with a pinned prefix.
            tokens: limit of the length of one prefix.
            share: limit of the fraction of all KV blocks, for all sessions together.

        """
        if not self.instant_pinning_fits:
            return "the patch pinned_prefixes does not fit this vLLM (see vllm-instant doctor)"
        managers = self.kv_cache_manager.coordinator.single_type_managers
        if any(type(manager).__name__ != "FullAttentionManager" for manager in managers):
            return "the model has KV caches of other kinds than full attention"
        if self.connector is not None:
            return "a KV connector is configured"
        if self.use_eagle:
            return "the drafter needs the states of the prompt's last tokens (EAGLE)"
        if self.instant_pinned is None:
            pool = self.kv_cache_manager.block_pool
            sizes = [manager.block_size for manager in managers]
            self.instant_pinned = PinnedPrefixes(pool, sizes, pool.num_gpu_blocks)
            self._evict_when_short(self.instant_pinned)
        self._instant_pinned_share = share
        return (
            None
            if self.instant_pinned.open(name, sessions, tokens)
            else "the limit of sessions with a pinned prefix is reached"
        )

    def instant_let_go(self, name: str) -> None:
        """Unpin the prefix of a session."""
        if self.instant_pinned is not None:
            self.instant_pinned.unpin(name)

    def _evict_when_short(self, pinned: PinnedPrefixes) -> None:
        """Unpin prefixes before a request waits or is preempted because KV blocks are short."""
        allocate = self.kv_cache_manager.allocate_slots

        def allocate_slots(*args: Any, **kwargs: Any) -> Any:
            blocks = allocate(*args, **kwargs)
            while blocks is None and pinned.evict_lru():
                blocks = allocate(*args, **kwargs)
            return blocks

        self.kv_cache_manager.allocate_slots = allocate_slots

    def _get_local_prefix_cache_hit(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        found = super()._get_local_prefix_cache_hit(request, *args, **kwargs)  # type: ignore[misc]
        name = _session_of(request)
        if self.instant_pinned is None or name is None or request.skip_reading_prefix_cache:
            return found
        blocks, hit, *rest = found
        tokens, groups = self.instant_pinned.find(name, request.all_token_ids, _key(request))
        if tokens <= hit:
            return found
        return (type(blocks)(groups), tokens, *rest)

    def _free_request_blocks(self, request: Request) -> None:
        name = _session_of(request)
        # A preempted request frees its blocks because they are short; they must not be pinned.
        if self.instant_pinned is not None and name is not None and request.is_finished():
            computed = min(request.num_computed_tokens - request.num_output_placeholders, request.num_tokens - 1)
            if computed > 0:
                managers = self.kv_cache_manager.coordinator.single_type_managers
                groups = [manager.req_to_blocks.get(request.request_id, []) for manager in managers]
                size = min(len(group) * manager.block_size for group, manager in zip(groups, managers, strict=True))
                tokens = request.all_token_ids[: min(computed, size)]
                self.instant_pinned.pin(name, tokens, groups, _key(request), self._instant_pinned_share)
        super()._free_request_blocks(request)  # type: ignore[misc]

    def reset_prefix_cache(self, *args: Any, **kwargs: Any) -> bool:
        """Unpin all prefixes as well, because the weights may have changed."""
        if self.instant_pinned is not None:
            self.instant_pinned.clear()
        return bool(super().reset_prefix_cache(*args, **kwargs))  # type: ignore[misc]


def _session_of(request: Request) -> str | None:
    # Their keys and values depend on pictures or vectors, which the token ids do not show.
    if request.mm_features or request.prompt_embeds is not None:
        return None
    sampling = request.sampling_params
    name = (sampling.extra_args or {}).get(HOLD) if sampling is not None else None
    return name if isinstance(name, str) else None


def _key(request: Request) -> tuple[Any, Any]:
    """Everything besides the tokens that keys and values depend on, and the tenant that may share them."""
    return request.lora_request.lora_int_id if request.lora_request is not None else None, request.cache_salt


def _allow(module: Any) -> None:
    PinningMixin.instant_pinning_fits = True


_SCHEDULER = "v1/core/sched/scheduler.py"
_MANAGER = "v1/core/single_type_kv_cache_manager.py"
_POOL = "v1/core/block_pool.py"

PATCH = VllmPatch(
    name="pinned_prefixes",
    purpose="sessions of arriving prompts keep their KV blocks between chunks",
    requirements=(
        HasSignature(_SCHEDULER, "Scheduler._get_local_prefix_cache_hit", ("self", "request")),
        References(_SCHEDULER, "Scheduler.schedule", ("_get_local_prefix_cache_hit", "num_new_local_computed_tokens")),
        HasSignature(_SCHEDULER, "Scheduler._free_request_blocks", ("self", "request"), exact=True),
        HasSignature(_SCHEDULER, "Scheduler.reset_prefix_cache", ("self",)),
        References(_SCHEDULER, "Scheduler.__init__", ("kv_cache_manager", "connector", "use_eagle")),
        HasSignature("v1/core/kv_cache_manager.py", "KVCacheManager.allocate_slots", ("self", "request")),
        HasSignature(_MANAGER, "SingleTypeKVCacheManager._has_partial_local_hit", ("self", "new_computed_blocks")),
        References(_MANAGER, "SingleTypeKVCacheManager.allocate_new_blocks", ("_partial_hit_reqs", "_apply_cow")),
        References(_MANAGER, "SingleTypeKVCacheManager.__init__", ("req_to_blocks", "block_size")),
        HasAttribute(_MANAGER, "FullAttentionManager"),
        HasSignature(_POOL, "BlockPool.touch", ("self", "blocks"), exact=True),
        HasSignature(_POOL, "BlockPool.free_blocks", ("self", "ordered_blocks")),
        References("v1/request.py", "Request.__init__", ("num_output_placeholders", "skip_reading_prefix_cache")),
        References("v1/request.py", "Request.__init__", ("mm_features", "prompt_embeds")),
    ),
    slots=("streaming",),
    optional=True,
    on_import={SCHEDULER: _allow},
)
