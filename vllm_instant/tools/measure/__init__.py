"""Measures live servers: starts them, streams answers and counts tokens, and computes intervals and verdicts.

The commands, the demo, the benchmarks and the engine tests all start, measure and stop servers with it.
"""
