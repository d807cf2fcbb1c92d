"""Prefill of prompts while they are still being typed: sessions, their limits and routes, without vLLM.

``session`` follows one prompt, ``session_manager`` all sessions of a server; ``routes`` is HTTP and WebSocket;
``engine`` is the interface to an engine, which ``vllm_instant.patches.streaming`` implements for vLLM. The plugin of
the slot ``streaming`` decides what is prefilled, and when.
"""
