"""Which requests run: live requests, admission, prefixes that are pinned in the KV cache; without vLLM."""
