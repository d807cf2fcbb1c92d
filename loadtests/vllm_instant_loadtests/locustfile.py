"""For ``locust -f``: plays scenarios against servers, with Locust's web page or without."""

from __future__ import annotations

from locust import events

from vllm_instant_loadtests import locust_runner, run_options
from vllm_instant_loadtests.users import ScenarioUser, SessionUser

__all__ = ["ScenarioUser", "SessionUser"]

events.init_command_line_parser.add_listener(run_options.add_options)
events.init.add_listener(locust_runner.install)
