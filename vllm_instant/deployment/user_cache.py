"""The folder in which this package keeps what it may lose."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs


def user_cache(name: str) -> Path:
    """A folder or file of this name in the user's cache.

    A user without a home, as containers with a random user id have, has no cache either. The path is then one that
    cannot exist, so that reading and writing fail as on a full disk.
    """
    try:
        return Path(platformdirs.user_cache_dir("vllm-instant")) / name
    except RuntimeError:
        return Path(os.devnull) / name
