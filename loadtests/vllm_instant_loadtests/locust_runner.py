"""A run from its beginning to its end inside of Locust: one process, or a master that hands parts to its workers."""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import gevent
import httpx
from gevent.event import Event
from locust.runners import LocalRunner, MasterRunner, WorkerRunner

from vllm_instant.tools.measure.environment_info import environment_info
from vllm_instant.tools.measure.sampling import RefusedError
from vllm_instant.tools.measure.server_info import ServerInfo, authorization, read_server_info
from vllm_instant.tools.measure.servers import SETTLE_SECONDS
from vllm_instant_loadtests import locust_stats, run_recorder, schedule
from vllm_instant_loadtests.load_driver import LoadDriver, SegmentTask, split_requests
from vllm_instant_loadtests.run_recorder import GeneratorSample, RecordedRequest, RunRecorder
from vllm_instant_loadtests.scenario import Scenario, ScenarioError, built_in, load, named_servers

logger = logging.getLogger("loadtest")
LEAD_SECONDS = 0.5
"""From when a part is handed out to its beginning."""
PATIENCE_SECONDS = 15.0
"""How much later than possible a worker's last records may come before it is given up."""
SENDING_SECONDS = 1.0
DEPLOYMENTS = "LOADTEST_DEPLOYMENTS"
"""Variable with ``deployment`` and ``instant`` of each server, as JSON by name."""
PART, RECORDS, PLAYED, STOP = "loadtest_part", "loadtest_records", "loadtest_played", "loadtest_stop"


def add_options(parser: Any) -> None:
    """The options that load tests add to Locust's, on the command line, in the environment and on its web page."""
    group = parser.add_argument_group("vllm-instant load tests")

    def add(name: str, variable: str, **more: Any) -> None:
        group.add_argument(name, env_var=f"LOADTEST_{variable}", **more)

    names = ", ".join(built_in())
    add("--scenario", "SCENARIO", default="steady", help=f"A TOML file, or one of: {names}.")
    add("--servers", "SERVERS", default="", help="NAME=URL of each, apart by spaces; without: the host.")
    add("--output", "OUTPUT", default="", help="Folder for what is recorded; loadtest-DATE-TIME without.")
    add("--seed", "SEED", default="0", help="Of prompts and arrivals.")
    add("--rate-scale", "RATE_SCALE", type=float, default=1.0, help="Multiplies every rate.")
    add("--duration", "DURATION", type=float, default=0.0, help="Seconds to which the timeline is stretched.")
    add("--together", "TOGETHER", action="store_true", help="Ask all servers at the same time, not in turn.")


@dataclass(frozen=True)
class RunOptions:
    """What was asked for."""

    scenario: Scenario
    servers: dict[str, str]
    """Addresses by name."""
    seed: str
    trace_speed: float
    output: Path

    @classmethod
    def of(cls, options: argparse.Namespace, host: str | None) -> RunOptions:
        """From Locust's options; raises ScenarioError."""
        scenario = load(options.scenario)
        seconds = float(options.duration or 0)
        if float(options.rate_scale) <= 0 or seconds < 0:
            raise ScenarioError("--rate-scale and --duration should be above 0")
        scenario = scenario.scaled(float(options.rate_scale), seconds or None)
        if options.together:
            scenario = scenario.model_copy(
                update={"alternation": scenario.alternation.model_copy(update={"together": True})}
            )
        servers = named_servers(options.servers) if options.servers else {"server": host or ""}
        if not all(servers.values()):
            raise ScenarioError("say which server to ask: --host URL, or --servers NAME=URL for several")
        output = Path(options.output) if options.output else Path(f"loadtest-{time.strftime('%Y%m%d-%H%M%S')}")
        number, free = 2, output
        while (free / "run.json").exists():  # a second run from the web page
            free, number = output.with_name(f"{output.name}-{number}"), number + 1
        return cls(scenario, servers, str(options.seed), float(options.rate_scale), free)


class ScenarioRunner:
    """Plays scenarios in Locust's process, or in its workers.

    Args:
        environment: Locust's.

    """

    def __init__(self, environment: Any) -> None:
        self._environment = environment
        self._runner = environment.runner
        self._recorder: RunRecorder | None = None
        self._playing: gevent.Greenlet | None = None
        self._stopped = self._lost = False
        self._played: dict[str, Event] = {}
        self._player = LoadDriver(self._record, self._report)
        if isinstance(self._runner, MasterRunner):
            self._runner.register_message(RECORDS, self._receive)
            self._runner.register_message(PLAYED, lambda msg, **_: self._played[msg.node_id].set())

    def start(self, **_: Any) -> None:
        """Begin a run; called when Locust starts a test."""
        self._stopped = self._lost = False
        self._playing = gevent.spawn(self._run)

    def stop(self, **_: Any) -> None:
        """End it early; called when Locust stops a test, also after a run's own end."""
        if self._playing is not None and not self._playing.dead and gevent.getcurrent() is not self._playing:
            self._stopped = True
            self._tell(STOP, {})
            self._player.stop()
            self._playing.join(timeout=PATIENCE_SECONDS)

    def _run(self) -> None:
        code = 0
        try:
            choices = RunOptions.of(self._environment.parsed_options, self._environment.host)
            self._play(choices)
        except (ScenarioError, RefusedError, FileExistsError) as error:
            logger.error("%s", error)
            code = 2
        except gevent.GreenletExit:
            return
        except Exception:  # Locust would wait for the end of the run for ever
            logger.exception("the run failed")
            code = 2
        self._end(code)

    def _end(self, code: int) -> None:
        """The run is over: leave, or wait for the next start from the web page."""
        if self._stopped:
            return
        options = self._environment.parsed_options
        self._playing = None
        if options is None or not (options.headless or options.autostart):
            self._runner.stop()
            return
        self._environment.process_exit_code = code
        self._runner.quit()
        if self._environment.web_ui is not None:
            self._environment.web_ui.stop()

    def _play(self, choices: RunOptions) -> None:
        scenario, headers = choices.scenario, authorization(None)
        due = schedule.scheduled_requests(scenario, choices.seed, choices.trace_speed)
        if not due:
            raise ScenarioError(f"{scenario.name} sends nothing in {scenario.seconds:g} s: raise its rate or duration")
        served = {name: read_server_info(url, headers) for name, url in choices.servers.items()}
        targets = {name: {"url": found.url, "model": found.name, "headers": headers} for name, found in served.items()}
        self._warm_up(due, targets)
        other = schedule.scheduled_requests(scenario, f"{choices.seed}/warm-up", choices.trace_speed)
        before = [request for request in other if request.at < scenario.warm_up_seconds]
        for name in targets if before else ():
            segment = schedule.Segment(-1, (name,), 0.0, scenario.warm_up_seconds)
            self._play_segment(segment, before, targets, time.time(), scenario)
            if self._stopped:
                return
        gevent.sleep(SETTLE_SECONDS)
        epoch, clock = time.time(), time.perf_counter()
        about = _about(choices, served, headers, clock)
        self._recorder = RunRecorder(choices.output, about)
        watching = _watching(choices, clock)
        try:
            logger.info("%s: %d requests over %.0f s", scenario.title, len(due), scenario.seconds)
            for segment in schedule.segments(scenario, list(targets), choices.seed):
                if about["segments"] and not self._stopped:
                    gevent.sleep(SETTLE_SECONDS)  # see measure.servers.settle
                if self._stopped:
                    break
                about["segments"] += self._play_segment(segment, due, targets, epoch, scenario)
                self._recorder.update(about)
            about["finished"] = not self._stopped and not self._lost
        finally:
            watching.terminate()
            watching.wait()
            self._recorder.update(about)
            self._recorder.close()
            self._recorder = None
            logger.info("recorded in %s; vllm-instant loadtest --analyse %s says what it shows", *[choices.output] * 2)

    def _play_segment(
        self,
        segment: schedule.Segment,
        due: list[schedule.ScheduledRequest],
        targets: Mapping[str, dict[str, Any]],
        epoch: float,
        scenario: Scenario,
    ) -> list[dict[str, Any]]:
        logger.info("%s: %.0f to %.0f s", " and ".join(segment.servers), segment.begin, segment.end)
        part = SegmentTask(
            segment=segment.number,
            servers={name: targets[name] for name in segment.servers},
            epoch=epoch,
            begins=time.time() - epoch + LEAD_SECONDS,
            offset=segment.begin,
            seconds=segment.end - segment.begin,
            drain_seconds=scenario.alternation.drain_seconds,
        )
        inside = [request for request in due if segment.begin <= request.at < segment.end]
        if isinstance(self._runner, MasterRunner):
            self._hand_out(part, inside)
        else:
            self._player.play(replace(part, requests=split_requests(inside, 1)[0]))
        return [
            {
                "server": server,
                "number": segment.number,
                "began": round(part.begins, 4),
                "ended": round(time.time() - epoch, 4),
                "from": segment.begin,
                "until": segment.end,
            }
            for server in segment.servers
        ]

    def _hand_out(self, part: SegmentTask, due: list[schedule.ScheduledRequest]) -> None:
        """Give every worker its share and wait until all have sent the last record of it."""
        workers = [client.id for client in self._runner.clients.all]
        self._played = {worker: Event() for worker in workers}
        for worker, share in zip(workers, split_requests(due, len(workers)), strict=True):
            self._runner.send_message(PART, asdict(replace(part, requests=share)), worker)
        deadline = time.time() + part.seconds + part.drain_seconds + PATIENCE_SECONDS
        for worker in workers:
            while not self._played[worker].wait(timeout=1.0):
                if time.time() > deadline or worker not in self._runner.clients:
                    logger.error("worker %s is lost, and what it had not sent yet", worker)
                    self._lost = True
                    break

    def _warm_up(self, due: list[schedule.ScheduledRequest], targets: Mapping[str, dict[str, Any]]) -> None:
        """One request of each kind to every server, so that no first time is measured."""
        first = {one.kind: one for one in reversed(due)}.values()
        for name, target in targets.items():
            for one in first:
                other = {"text": "warm-up " * 8}
                body = {**one.body, "max_tokens": min(16, one.body["max_tokens"])}
                if "messages" in body:
                    body["messages"] = [{"role": "user", "content": other["text"]}]
                else:
                    body["prompt"] = other["text"]
                answer = self._player.ask(target, replace(one, body=body, leave_after=None))
                if answer.error:
                    raise RefusedError(f"{name} does not answer a request of kind {one.kind!r}: {answer.error}")

    def _receive(self, msg: Any, **_: Any) -> None:
        """Records of a worker."""
        for name, values in msg.data["records"]:
            self._record(run_recorder.request(values) if name == "request" else GeneratorSample(**values))

    def _record(self, record: RecordedRequest | GeneratorSample) -> None:
        if self._recorder is not None:
            self._recorder.add(record)

    def _report(self, request: RecordedRequest) -> None:
        if self._recorder is not None:  # not while warming up
            locust_stats.report(self._environment, request)

    def _tell(self, message: str, data: dict[str, Any]) -> None:
        if isinstance(self._runner, MasterRunner):
            self._runner.send_message(message, data)


class ScenarioWorker:
    """Plays the parts that a master hands out, and sends it what it records; nothing stays here.

    Args:
        environment: Locust's.

    """

    def __init__(self, environment: Any) -> None:
        self._environment = environment
        self._runner = environment.runner
        self._records: list[tuple[str, dict[str, Any]]] = []
        self._player: LoadDriver | None = None
        self._runner.register_message(PART, self._play, concurrent=True)
        self._runner.register_message(STOP, self._stop, concurrent=True)
        gevent.spawn(self._send_now_and_then)

    def _play(self, msg: Any, **_: Any) -> None:
        if self._player is None:
            self._player = LoadDriver(self._record, self._report, max(0, self._runner.worker_index))
        self._player.play(SegmentTask(**msg.data))
        self._send()
        self._runner.send_message(PLAYED, {})

    def _stop(self, **_: Any) -> None:
        if self._player is not None:
            self._player.stop()

    def _report(self, request: RecordedRequest) -> None:
        if (request.segment or 0) >= 0:  # not while warming up
            locust_stats.report(self._environment, request)

    def _record(self, record: RecordedRequest | GeneratorSample) -> None:
        self._records.append(
            ("request" if isinstance(record, RecordedRequest) else "client", run_recorder.plain(record))
        )

    def _send_now_and_then(self) -> None:
        while True:
            gevent.sleep(SENDING_SECONDS)
            self._send()

    def _send(self) -> None:
        if self._records:
            records, self._records = self._records, []
            self._runner.send_message(RECORDS, {"records": records})


def install(environment: Any, **_: Any) -> None:
    """Make Locust play scenarios; for its ``init`` event."""
    runner = environment.runner
    logging.getLogger("httpx").setLevel(logging.WARNING)
    # A full collection looks at all that Locust and its web server have loaded: a tenth of a second for every stream.
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)
    if isinstance(runner, WorkerRunner):
        ScenarioWorker(environment)
        return
    if isinstance(runner, LocalRunner | MasterRunner):
        conductor = ScenarioRunner(environment)
        environment.events.test_start.add_listener(conductor.start)
        environment.events.test_stopping.add_listener(conductor.stop)
        options = environment.parsed_options
        if options is not None and options.num_users is None:
            # One user in every process; how much is sent is not their business.
            options.num_users = max(1, options.expect_workers if isinstance(runner, MasterRunner) else 1)


def _about(
    choices: RunOptions, served: Mapping[str, ServerInfo], headers: Mapping[str, str], clock: float
) -> dict[str, Any]:
    scenario = choices.scenario
    return {
        "scenario": {
            "name": scenario.name,
            "title": scenario.title,
            "description": scenario.description,
            "seconds": scenario.seconds,
            "kinds": [traffic.kind for traffic in scenario.traffic],
        },
        "goals": scenario.goals.model_dump(mode="json", exclude_none=True),
        "servers": [
            {
                "name": name,
                "url": found.url,
                "model": found.model,
                "version": found.version,
                **_deployment(name, found.url, headers),
            }
            for name, found in served.items()
        ],
        "segments": [],
        "together": scenario.alternation.together and len(served) > 1,
        "seed": choices.seed,
        "began": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "clock": clock,
        "finished": False,
        "environment_info": environment_info(os.environ.get("LOADTEST_COMMAND") or " ".join(["locust", *sys.argv[1:]])),
    }


def _deployment(name: str, url: str, headers: Mapping[str, str]) -> dict[str, Any]:
    """How a server was started, where whoever started it has said so; else what it says itself."""
    told = json.loads(os.environ.get(DEPLOYMENTS, "{}"))
    if name in told:
        return dict(told[name])
    try:
        answer = httpx.get(f"{url}/v1/instant/deployment", headers=dict(headers), timeout=10)
        ours = answer.status_code == 200
    except httpx.HTTPError:
        ours = False
    return {"deployment": "", "instant": ours}


def _watching(choices: RunOptions, clock: float) -> subprocess.Popen[bytes]:
    servers = [f"{name}={url}" for name, url in choices.servers.items()]
    module = "vllm_instant_loadtests.metrics_poller"
    command = [sys.executable, "-m", module, str(choices.output), *servers, "--clock", repr(clock)]
    return subprocess.Popen(command, start_new_session=True)
