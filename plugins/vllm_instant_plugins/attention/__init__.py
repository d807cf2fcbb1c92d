"""Attention over an FP8 cache by this project's Triton kernels."""
