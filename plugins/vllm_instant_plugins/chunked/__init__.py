"""Reads prompts ahead in chunks: ``chunked`` leaves whole KV blocks behind, ``resumable`` holds everything."""
