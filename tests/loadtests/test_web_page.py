"""What a client that reaches Locust's page can make a load generator do."""

import argparse
import os
import subprocess
import sys
import textwrap

import pytest

from vllm_instant_loadtests import load_driver
from vllm_instant_loadtests.load_driver import LoadDriver
from vllm_instant_loadtests.run_options import of_page


def options(**changed):
    given = {"scenario": "steady", "servers": "ours=http://10.0.0.1:8000", "output": "mine", "rate_scale": 1.0}
    searched = {"closed_loop": False, "capacity": "", "max_seconds": 0.0}
    return argparse.Namespace(**{**given, **searched, **changed})


def test_the_page_changes_neither_servers_nor_files():
    asked = options(
        servers="x=http://attacker", output="/etc/cron.d", scenario="/etc/passwd", rate_scale=2.0, capacity="{}"
    )
    found = of_page(asked, options())
    assert (found.servers, found.output, found.scenario) == ("ours=http://10.0.0.1:8000", "mine", "steady")
    assert (found.rate_scale, found.capacity) == (2.0, "")


def test_the_page_chooses_among_built_in_scenarios():
    assert of_page(options(scenario="burst"), options()).scenario == "burst"
    assert of_page(options(), options(scenario="my.toml")).scenario == "steady"


def _elsewhere(code, **environment):
    """Run code in a process of its own: Locust replaces threads and locks, and loads Flask, whose proxies raise when
    vLLM looks through all modules."""
    inherited = {name: value for name, value in os.environ.items() if name != "LOCUST_WEB_HOST"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**inherited, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.split()


@pytest.mark.parametrize(("environment", "host"), [({}, "127.0.0.1"), ({"LOCUST_WEB_HOST": "10.0.0.2"}, "10.0.0.2")])
def test_the_page_listens_on_loopback_unless_told_otherwise(environment, host):
    code = """
        from locust.argument_parser import get_empty_argument_parser
        from vllm_instant_loadtests import run_options

        parser = get_empty_argument_parser(add_help=False)
        parser.add_argument("--web-host", default="")
        run_options.add_options(parser)
        print(parser.parse_args([]).web_host, parser.parse_args(["--web-host", "10.0.0.1"]).web_host)
    """
    assert _elsewhere(code, **environment) == [host, "10.0.0.1"]


def test_a_key_is_not_part_of_what_a_master_sends(monkeypatch):
    seen = []

    class Client:
        def __init__(self, url, model, headers):
            seen.append((url, headers))

    monkeypatch.setattr(load_driver, "StreamingClient", Client)
    driver = LoadDriver(print, print, headers={"Authorization": "Bearer mine"})
    driver._clients_of({"ours": {"url": "http://10.0.0.1:8000", "model": "m"}})
    assert seen == [("http://10.0.0.1:8000", {"Authorization": "Bearer mine"})]
    assert "headers" not in str(load_driver.SegmentTask.__dataclass_fields__)


def test_a_run_from_the_page_goes_to_the_servers_of_the_command_line():
    code = """
        from argparse import Namespace
        from types import SimpleNamespace
        from vllm_instant_loadtests import locust_runner

        asked = []
        locust_runner.RunOptions.of = classmethod(lambda cls, found, host: asked.append((found.servers, host)))
        given = Namespace(scenario="steady", servers="", output="mine", capacity="", max_seconds=0)
        given.closed_loop, given.rate_scale = False, 1.0

        events = SimpleNamespace(request=SimpleNamespace(add_listener=lambda listener: None))
        environment = SimpleNamespace(runner=None, host="http://10.0.0.1:8000", parsed_options=given, events=events)
        runner = locust_runner.ScenarioRunner(environment)
        runner._run_scenario = runner._end = lambda _: None
        # What the page's form does.
        given.servers, environment.host = "x=http://attacker", "http://attacker"
        runner._run()
        print(*asked)
    """
    assert _elsewhere(code) == ["('',", "'http://10.0.0.1:8000')"]
