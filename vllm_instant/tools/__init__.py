"""Offline tools: the command line, measurements, training. No vLLM process loads anything below this package."""
