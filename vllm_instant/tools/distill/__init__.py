"""Makes a small draft model for a target model: ``vllm-instant distill``."""
