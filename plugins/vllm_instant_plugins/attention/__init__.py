"""Attention over an FP8 KV cache by this project's Triton kernels."""
