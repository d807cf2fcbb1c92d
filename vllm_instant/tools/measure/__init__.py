"""Machinery for honest comparisons: live servers, a streaming client that counts tokens, intervals.

Used by the demo, the benchmarks and the engine tests, so that all of them start, measure and stop servers alike.
"""
