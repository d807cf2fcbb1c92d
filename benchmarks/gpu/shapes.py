"""Sizes that the measurements of attention share, and how much buffers that take turns hold together."""

HEAD, KV_HEADS, BLOCK = 128, 8, 16
ROTATED_BYTES = 256 << 20
"""Buffers that take turns are together at least this large, several times an L2 cache."""
