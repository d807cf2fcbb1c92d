"""The deployment file: its sources and checks, the plugins that it names, and the circuit breaker around them."""
