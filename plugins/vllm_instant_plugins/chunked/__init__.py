"""Reads prompts ahead in chunks of whole KV blocks."""
