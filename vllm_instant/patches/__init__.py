"""Every use of vLLM's internals, one file per patch; ``wrapped_methods`` lists the methods that they wrap.

Nothing outside this package imports vLLM. A patch file declares in ``PATCH`` which vLLM names and signatures it relies
on; ``vllm_instant.patches.registry`` checks them against vLLM's sources without importing or running them.
"""
