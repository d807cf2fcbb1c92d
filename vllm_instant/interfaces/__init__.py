"""What a plugin of each kind implements: one module per slot, and the data that plugins exchange with the runtime.

``vllm_instant`` re-exports the names that drafters, policies and samplers need; import all others from their module
here. Derive from a slot's protocol, which brings its optional methods along.

Units: numbers of tokens for lengths, seconds for times. All methods are on the hot path of a server. A method that
raises is not called again: vLLM's own behavior takes over (``vllm_instant.deployment.circuit_breaker``).
"""
