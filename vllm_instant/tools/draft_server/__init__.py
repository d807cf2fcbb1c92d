"""``vllm-instant draft-server``: drafts for the requests of many engines, by a model of its own."""
