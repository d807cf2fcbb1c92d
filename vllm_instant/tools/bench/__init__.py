"""``vllm-instant bench``: measures a deployment against vLLM with the same model, with verdicts for every row."""
