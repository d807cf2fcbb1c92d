"""Which requests search each other's outputs: those with the same cache salt."""

from __future__ import annotations

from collections import OrderedDict

MAX_GROUPS = 4096
"""Limit of the cache salts whose histories are kept apart; one that returns after this many others starts anew."""


class CacheSaltGroups:
    """Numbers of the histories that requests share.

    Args:
        share_across_cache_salts: Whether all requests share one history.

    """

    def __init__(self, share_across_cache_salts: bool) -> None:
        self._share_across_cache_salts = share_across_cache_salts
        self._groups: OrderedDict[str, int] = OrderedDict()
        self._next_group = 0

    def __len__(self) -> int:
        return len(self._groups)

    def group(self, cache_salt: str) -> int | None:
        """The number of the history that requests with this cache salt share; None without one.

        Clients that send no salt may be strangers: counts of accepted drafts would tell one what another was answered.
        """
        if self._share_across_cache_salts:
            return 0
        if not cache_salt:
            return None
        group = self._groups.get(cache_salt)
        if group is None:
            group = self._groups[cache_salt] = self._next_group
            self._next_group += 1
            if len(self._groups) > MAX_GROUPS:
                self._groups.popitem(last=False)
        else:
            self._groups.move_to_end(cache_salt)
        return group
