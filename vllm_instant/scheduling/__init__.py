"""Scheduling without vLLM: live requests, the admission of waiting ones, and pinned KV-cache prefixes."""
