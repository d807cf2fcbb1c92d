"""Prefills prompts in chunks while they are typed: ``chunked`` keeps no KV blocks, ``resumable`` keeps them all."""
