"""Servers as single queues, whose capacity is known exactly: for tests of the capacity search."""

from __future__ import annotations

import math

import numpy as np

from vllm_instant_loadtests.capacity_goals import ProbeResult, ShareGoal


def exact_capacity(service_rate: float, goal: ShareGoal) -> float:
    """The arrival rate at which ``goal.target`` of an M/M/1 queue's times in the system are within its limit.

    The time in the system is exponential with the rate ``service_rate - arrival_rate``.
    """
    return service_rate + math.log(1 - goal.target) / goal.limit


def probe(
    server: str, rate: float, service_rate: float, goals: list[ShareGoal], random: np.random.Generator, seconds: float
) -> ProbeResult:
    """A simulated probe with Poisson arrivals and exponential service; a quarter of the time builds up the load."""
    whole = 1.25 * seconds
    due = np.sort(random.uniform(0, whole, random.poisson(rate * whole)))
    served = np.cumsum(random.exponential(1 / service_rate, len(due)))
    # Lindley's recursion: a request ends after its own service and after all before it.
    ended = served + np.maximum.accumulate(due - np.concatenate([[0.0], served[:-1]]))
    took = (ended - due)[due >= whole - seconds]
    counts = {}
    for goal in goals:
        limit = goal.limit if not math.isnan(goal.limit) else min(g.limit for g in goals if not math.isnan(g.limit))
        counts[goal.name] = (float((took <= limit).sum()), float(len(took)))
    good = min(good for good, _ in counts.values())
    return ProbeResult(server, rate, seconds, len(took), counts, good / seconds, float(took.sum() / seconds))
