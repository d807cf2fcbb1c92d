"""Prompts that are read while they are still arriving: sessions, their rules and their routes, without vLLM.

``session`` follows one prompt, ``host`` all of them, ``routes`` is HTTP and WebSocket, ``engine`` says what is needed
of an engine (``vllm_instant.patches.streaming`` has vLLM's). What is read when is up to the plugin of the slot
``streaming``.
"""
