"""What a deployment does for a model: `vllm-instant bench` measures it beside stock vLLM and says how sure it is."""
