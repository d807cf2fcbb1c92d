"""Triton kernels; they need PyTorch and Triton, and neither vLLM nor a device to be imported."""
