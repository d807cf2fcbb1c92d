"""Every touch of vLLM's internals, one file a patch.

Nothing outside this package imports vLLM. A patch file declares in ``PATCH`` which vLLM names and signatures it relies
on; ``vllm_instant.patches.registry`` checks them against vLLM's sources without importing or running them.
"""
