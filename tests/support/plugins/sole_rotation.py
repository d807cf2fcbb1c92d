"""``fp8_fused`` with all that it can do, in a process where nothing else may rotate queries and keys, or write keys."""

import logging

from vllm_instant_plugins.attention.fused import FusedAttention

logger = logging.getLogger("vllm.instant")


class SoleRotation(FusedAttention):
    def __init__(self):
        super().__init__("cpu", 128, rotate=True, feed_forward=True)
        self._told = False
        forbid_vllms_rotation()

    def write(self, key, value, cache, slots):
        raise AssertionError("keys came that were rotated before")

    def rotate_and_write(self, query, *rest):
        served = super().rotate_and_write(query, *rest)
        if not self._told:
            logger.info("SoleRotation: %d tokens were rotated and written", len(query))
            self._told = True
        return served


def forbid_vllms_rotation():
    """Compiled or not, by a kernel or by tensor operations."""
    from vllm import _custom_ops
    from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding

    def forbidden(*args, **kwargs):
        raise AssertionError("vLLM rotated")

    _custom_ops.rotary_embedding = forbidden
    RotaryEmbedding.forward_static = staticmethod(forbidden)
