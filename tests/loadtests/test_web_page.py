"""What a client that reaches Locust's page can make a load generator do."""

import argparse
from types import SimpleNamespace

import pytest

from vllm_instant_loadtests import load_driver, run_options
from vllm_instant_loadtests.load_driver import LoadDriver
from vllm_instant_loadtests.run_options import of_page

with pytest.MonkeyPatch.context() as patch:
    # Locust would replace the threads, locks and sockets of the process that runs the tests.
    patch.setenv("LOCUST_SKIP_MONKEY_PATCH", "1")
    from locust.argument_parser import get_empty_argument_parser


def options(**changed):
    given = {"scenario": "steady", "servers": "ours=http://10.0.0.1:8000", "output": "mine", "rate_scale": 1.0}
    return argparse.Namespace(**{**given, **changed})


def test_the_page_changes_neither_servers_nor_files():
    asked = options(servers="x=http://attacker", output="/etc/cron.d", scenario="/etc/passwd", rate_scale=2.0)
    found = of_page(asked, options())
    assert (found.servers, found.output, found.scenario) == ("ours=http://10.0.0.1:8000", "mine", "steady")
    assert found.rate_scale == 2.0


def test_the_page_chooses_among_built_in_scenarios():
    assert of_page(options(scenario="burst"), options()).scenario == "burst"
    assert of_page(options(), options(scenario="my.toml")).scenario == "steady"


def test_the_page_listens_on_loopback_unless_told_otherwise(monkeypatch):
    for variable, host in (("", "127.0.0.1"), ("10.0.0.2", "10.0.0.2")):
        monkeypatch.delenv("LOCUST_WEB_HOST", raising=False)
        if variable:
            monkeypatch.setenv("LOCUST_WEB_HOST", variable)
        parser = get_empty_argument_parser(add_help=False)
        parser.add_argument("--web-host", default="")
        run_options.add_options(parser)
        assert parser.parse_args([]).web_host == host
        assert parser.parse_args(["--web-host", "10.0.0.1"]).web_host == "10.0.0.1"


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


def test_a_run_from_the_page_goes_to_the_servers_of_the_command_line(monkeypatch):
    from vllm_instant_loadtests import locust_runner

    asked = []
    monkeypatch.setattr(
        locust_runner.RunOptions, "of", classmethod(lambda cls, found, host: asked.append((found, host)))
    )
    environment = SimpleNamespace(runner=None, host="http://10.0.0.1:8000", parsed_options=options(servers=""))
    runner = locust_runner.ScenarioRunner(environment)
    monkeypatch.setattr(runner, "_run_scenario", lambda _: None)
    monkeypatch.setattr(runner, "_end", lambda _: None)
    # What the page's form does.
    environment.parsed_options.servers, environment.host = "x=http://attacker", "http://attacker"
    runner._run()
    [(found, host)] = asked
    assert (found.servers, host) == ("", "http://10.0.0.1:8000")
