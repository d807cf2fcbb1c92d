"""Runs a scenario inside of Locust: in one process, or in a master that distributes tasks to its workers."""

from __future__ import annotations

import argparse
import gc
import logging
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import gevent
from gevent.event import Event
from locust.runners import LocalRunner, MasterRunner, WorkerRunner

from vllm_instant.tools.measure.sampling import RefusedError
from vllm_instant.tools.measure.server_info import authorization, read_server_info
from vllm_instant.tools.measure.servers import SETTLE_SECONDS
from vllm_instant_loadtests import locust_stats, run_recorder, schedule
from vllm_instant_loadtests.capacity import offered_rate
from vllm_instant_loadtests.capacity_runner import CapacityRunner, unfinished_run
from vllm_instant_loadtests.load_driver import LoadDriver, SegmentTask, split_requests
from vllm_instant_loadtests.locust_worker import PART, PLAYED, RECORDS, SENDING_SECONDS, STOP, ScenarioWorker
from vllm_instant_loadtests.run_description import describe_run
from vllm_instant_loadtests.run_options import DEFAULT_HOST, RunOptions, of_page
from vllm_instant_loadtests.run_recorder import GeneratorSample, RecordedRequest, RecordedRun, RunRecorder
from vllm_instant_loadtests.scenario import Scenario, ScenarioError, named_servers
from vllm_instant_loadtests.scheduled_request import ScheduledRequest
from vllm_instant_loadtests.user_recorder import USERS, UserRecorder, moved

logger = logging.getLogger("loadtest")
LEAD_SECONDS = 0.5
"""Time between sending a task and its beginning."""
WORKER_TIMEOUT_SECONDS = 15.0
"""Delay of a worker's last records after which the worker counts as lost."""


class ScenarioRunner:
    """Runs scenarios in Locust's process or in its workers.

    Args:
        environment: Locust's.

    """

    def __init__(self, environment: Any) -> None:
        self._environment = environment
        self._runner = environment.runner
        self._recorder: RunRecorder | None = None
        self._capacity: CapacityRunner | None = None
        self._users_of: tuple[str, float] | None = None
        environment.events.request.add_listener(UserRecorder(self._record).hear)
        self._run_greenlet: gevent.Greenlet | None = None
        self._stopped = self._lost = False
        self._finished: dict[str, Event] = {}
        self._driver = LoadDriver(self._record, self._report, headers=authorization(None))
        # Copies: Locust's page changes the options in place, and the host.
        self._given = argparse.Namespace(**vars(environment.parsed_options or argparse.Namespace()))
        self._host = environment.host
        if isinstance(self._runner, MasterRunner):
            self._runner.register_message(RECORDS, self._receive)
            self._runner.register_message(PLAYED, lambda msg, **_: self._finished[msg.node_id].set())

    def start(self, **_: Any) -> None:
        """Start a run; called when Locust starts a test, before users are spawned."""
        self._stopped = self._lost = False
        options = self._environment.parsed_options
        if options is not None:
            options.loadtest_url = next(iter(_addresses(self._given, self._host).values()), "")
        self._run_greenlet = gevent.spawn(self._run)

    def stop(self, **_: Any) -> None:
        """Stop it early; called when Locust stops a test, also after a run's own end."""
        if (
            self._run_greenlet is not None
            and not self._run_greenlet.dead
            and gevent.getcurrent() is not self._run_greenlet
        ):
            self._stopped = True
            self._tell(STOP, {})
            self._driver.stop()
            self._run_greenlet.join(timeout=WORKER_TIMEOUT_SECONDS)

    def _run(self) -> None:
        code = 0
        try:
            options = RunOptions.of(of_page(self._environment.parsed_options, self._given), self._host)
            self._run_scenario(options)
        except (ScenarioError, RefusedError, FileExistsError) as error:
            logger.error("%s", error)
            code = 2
        except gevent.GreenletExit:
            return
        except Exception:  # without an exit Locust would wait forever
            logger.exception("the run failed")
            code = 2
        self._end(code)

    def _end(self, code: int) -> None:
        """Exit after a run, or wait for the next start from the web page."""
        if self._stopped:
            return
        options = self._environment.parsed_options
        self._run_greenlet = None
        if options is None or not (options.headless or options.autostart):
            self._runner.stop()
            return
        self._environment.process_exit_code = code
        self._runner.quit()
        if self._environment.web_ui is not None:
            self._environment.web_ui.stop()

    def _run_scenario(self, options: RunOptions) -> None:
        if options.closed_loop:
            self._record_users(options)
            return
        scenario, headers = options.scenario, authorization(None)
        due = schedule.scheduled_requests(scenario, options.seed, options.trace_speed)
        if not due:
            raise ScenarioError(
                f"{scenario.name} sends no request in {scenario.seconds:g} s: raise its rate or duration"
            )
        servers = {name: read_server_info(url, headers) for name, url in options.servers.items()}
        targets = {name: {"url": found.url, "model": found.name} for name, found in servers.items()}
        self._warm_up(due, targets)
        other = schedule.scheduled_requests(scenario, f"{options.seed}/warm-up", options.trace_speed)
        before = [request for request in other if request.at < scenario.warm_up_seconds]
        for name in targets if before else ():
            segment = schedule.Segment(-1, (name,), 0.0, scenario.warm_up_seconds)
            self._run_segment(segment, before, targets, time.time(), scenario)
            if self._stopped:
                return
        gevent.sleep(SETTLE_SECONDS)
        known = unfinished_run(options, options.capacity) if options.capacity is not None else None
        # The clock of an interrupted search continues some seconds after its last probe.
        passed = max((one["ended"] + 5.0 for one in known.about["segments"]), default=0.0) if known else 0.0
        epoch, clock = time.time() - passed, time.perf_counter() - passed
        about = known.about if known is not None else describe_run(options, servers, headers, clock)
        self._recorder = RunRecorder(options.output, None if known is not None else about)
        poller = _start_poller(options, clock)
        send = partial(self._run_segment, targets=targets, epoch=epoch, scenario=scenario)
        try:
            if options.capacity is not None:
                self._search_capacity(options, about, known, targets, send)
            else:
                logger.info("%s: %d requests over %.0f s", scenario.title, len(due), scenario.seconds)
                self._run_segments(options, about, list(targets), partial(send, due=due))
        finally:
            poller.terminate()
            poller.wait()
            self._recorder.update(about)
            self._recorder.close()
            self._recorder = None
            logger.info("recorded in %s; analyse it with vllm-instant loadtest --analyse %s", *[options.output] * 2)

    def _run_segments(
        self,
        options: RunOptions,
        about: dict[str, Any],
        servers: list[str],
        send: Callable[[schedule.Segment], list[dict[str, Any]]],
    ) -> None:
        for segment in schedule.segments(options.scenario, servers, options.seed):
            if about["segments"] and not self._stopped:
                gevent.sleep(SETTLE_SECONDS)  # see measure.servers.settle
            if self._stopped:
                break
            about["segments"] += send(segment)
            if self._recorder is not None:
                self._recorder.update(about)
        about["finished"] = not self._stopped and not self._lost

    def _record_users(self, options: RunOptions) -> None:
        """Record what Locust's users do until the test is stopped, or for the duration that was asked for."""
        headers = authorization(None)
        servers = {name: read_server_info(url, headers) for name, url in options.servers.items()}
        (name,) = servers
        epoch, clock = time.time(), time.perf_counter()
        about = describe_run(options, servers, headers, clock)
        self._recorder = RunRecorder(options.output, about)
        self._users_of = name, epoch
        poller = _start_poller(options, clock)
        try:
            while not self._stopped and not (options.seconds and time.time() - epoch >= options.seconds):
                gevent.sleep(LEAD_SECONDS)
        finally:
            gevent.sleep(2 * SENDING_SECONDS if isinstance(self._runner, MasterRunner) else 0)  # the last records
            poller.terminate()
            poller.wait()
            ended = round(time.time() - epoch, 4)
            segment = {"server": name, "number": 0, "began": 0.0, "ended": ended, "from": 0.0, "until": ended}
            self._recorder.update(about | {"segments": [segment], "finished": not self._lost})
            self._recorder.close()
            self._recorder = self._users_of = None

    def _search_capacity(
        self,
        options: RunOptions,
        about: dict[str, Any],
        before: RecordedRun | None,
        targets: Mapping[str, dict[str, Any]],
        send: Callable[..., list[dict[str, Any]]],
    ) -> None:
        if options.capacity is None or self._recorder is None:
            return
        about |= {"capacity": asdict(options.capacity), "start_rate": offered_rate(options.scenario)}

        def stop() -> None:
            self._tell(STOP, {})
            self._driver.stop()

        self._capacity = CapacityRunner(
            options.capacity,
            options,
            about,
            targets,
            run_segment=lambda segment, due: send(segment, due=due),
            stop_segment=stop,
            late_first_tokens=self._driver.late_first_tokens,
            stopped=lambda: self._stopped or self._lost,
        )
        try:
            about["finished"] = self._capacity.run(before, self._recorder)
        finally:
            self._capacity = None

    def _run_segment(
        self,
        segment: schedule.Segment,
        due: list[ScheduledRequest],
        targets: Mapping[str, dict[str, Any]],
        epoch: float,
        scenario: Scenario,
    ) -> list[dict[str, Any]]:
        logger.info("%s: %.0f to %.0f s", " and ".join(segment.servers), segment.begin, segment.end)
        task = SegmentTask(
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
            self._distribute(task, inside)
        else:
            self._driver.run(replace(task, requests=split_requests(inside, 1)[0]))
        return [
            {
                "server": server,
                "number": segment.number,
                "began": round(task.begins, 4),
                "ended": round(time.time() - epoch, 4),
                "from": segment.begin,
                "until": segment.end,
            }
            for server in segment.servers
        ]

    def _distribute(self, task: SegmentTask, due: list[ScheduledRequest]) -> None:
        """Send every worker its share of a task and wait until all have sent their last records."""
        workers = [client.id for client in self._runner.clients.all]
        self._finished = {worker: Event() for worker in workers}
        for worker, share in zip(workers, split_requests(due, len(workers)), strict=True):
            self._runner.send_message(PART, asdict(replace(task, requests=share)), worker)
        deadline = time.time() + task.seconds + task.drain_seconds + WORKER_TIMEOUT_SECONDS
        for worker in workers:
            while not self._finished[worker].wait(timeout=1.0):
                if time.time() > deadline or worker not in self._runner.clients:
                    logger.error("worker %s is lost with the records that it had not sent", worker)
                    self._lost = True
                    break

    def _warm_up(self, due: list[ScheduledRequest], targets: Mapping[str, dict[str, Any]]) -> None:
        """Send one request of each kind to every server, so that first-time costs are not measured."""
        first = {one.kind: one for one in reversed(due)}.values()
        for name, target in targets.items():
            for one in first:
                other = {"text": "warm-up " * 8}
                body = {**one.body, "max_tokens": min(16, one.body["max_tokens"])}
                if "messages" in body:
                    body["messages"] = [{"role": "user", "content": other["text"]}]
                else:
                    body["prompt"] = other["text"]
                answer = self._driver.ask(target, replace(one, body=body, leave_after=None))
                if answer.error:
                    raise RefusedError(f"{name} does not answer a request of kind {one.kind!r}: {answer.error}")

    def _receive(self, msg: Any, **_: Any) -> None:
        """Record what a worker has sent."""
        for name, values in msg.data["records"]:
            self._record(run_recorder.request(values) if name == "request" else GeneratorSample(**values))

    def _record(self, record: RecordedRequest | GeneratorSample) -> None:
        if isinstance(record, RecordedRequest) and record.server == USERS:
            if self._users_of is None:
                return
            record = moved(record, -self._users_of[1], self._users_of[0])
        if self._recorder is not None:
            self._recorder.add(record)
            if self._capacity is not None and isinstance(record, RecordedRequest):
                self._capacity.hear(record)

    def _report(self, request: RecordedRequest) -> None:
        if self._recorder is not None:  # not while warming up
            locust_stats.report(self._environment, request)

    def _tell(self, message: str, data: dict[str, Any]) -> None:
        if isinstance(self._runner, MasterRunner):
            self._runner.send_message(message, data)


def install(environment: Any, **_: Any) -> None:
    """Make Locust run scenarios; for its ``init`` event."""
    runner = environment.runner
    logging.getLogger("httpx").setLevel(logging.WARNING)
    # A full garbage collection visits all objects of Locust and its web server and delays every stream by 0.1 s.
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
        closed = options is not None and options.closed_loop
        environment.user_classes = [
            user for user in environment.user_classes if (user.__name__ == "SessionUser") == closed
        ]
        if options is not None and options.num_users is None:
            # One user per process; the scenario decides what is sent.
            options.num_users = max(1, options.expect_workers if isinstance(runner, MasterRunner) else 1)


def _addresses(options: argparse.Namespace, host: str | None) -> dict[str, str]:
    """The servers of the command line; none where it has a mistake, which the run reports."""
    try:
        return named_servers(getattr(options, "servers", "") or host or DEFAULT_HOST)
    except ScenarioError:
        return {}


def _start_poller(options: RunOptions, clock: float) -> subprocess.Popen[bytes]:
    servers = [f"{name}={url}" for name, url in options.servers.items()]
    module = "vllm_instant_loadtests.metrics_poller"
    command = [sys.executable, "-m", module, str(options.output), *servers, "--clock", repr(clock)]
    return subprocess.Popen(command, start_new_session=True)
