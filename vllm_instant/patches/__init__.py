"""Every touch of vLLM's internals, one file a seam.

Nothing outside this package imports vLLM. A seam file declares in ``SEAM`` which vLLM names and signatures it relies
on; ``vllm_instant.patches.registry`` checks them against vLLM's sources without importing or running them.
"""
