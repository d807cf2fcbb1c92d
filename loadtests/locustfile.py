"""``locust -f loadtests/locustfile.py --host URL --scenario steady``; see docs/loadtests.md."""

from vllm_instant_loadtests.locustfile import ScenarioUser, SessionUser

__all__ = ["ScenarioUser", "SessionUser"]
