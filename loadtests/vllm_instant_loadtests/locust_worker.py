"""A load generator among several: runs the tasks that Locust's master sends, and sends it all records."""

from __future__ import annotations

from typing import Any

import gevent

from vllm_instant.tools.measure.server_info import authorization
from vllm_instant_loadtests import locust_stats, run_recorder
from vllm_instant_loadtests.load_driver import LoadDriver, SegmentTask
from vllm_instant_loadtests.run_recorder import GeneratorSample, RecordedRequest
from vllm_instant_loadtests.user_recorder import UserRecorder

SENDING_SECONDS = 1.0
PART, RECORDS, PLAYED, STOP = "loadtest_part", "loadtest_records", "loadtest_played", "loadtest_stop"


class ScenarioWorker:
    """Runs the tasks that a master sends, and sends it all records.

    Args:
        environment: Locust's.

    """

    def __init__(self, environment: Any) -> None:
        self._environment = environment
        self._runner = environment.runner
        self._records: list[tuple[str, dict[str, Any]]] = []
        self._driver: LoadDriver | None = None
        self._runner.register_message(PART, self._run_task, concurrent=True)
        self._runner.register_message(STOP, self._stop, concurrent=True)
        environment.events.request.add_listener(UserRecorder(self._record).hear)
        gevent.spawn(self._send_repeatedly)

    def _run_task(self, msg: Any, **_: Any) -> None:
        if self._driver is None:
            self._driver = LoadDriver(
                self._record, self._report, max(0, self._runner.worker_index), authorization(None)
            )
        self._driver.run(SegmentTask(**msg.data))
        self._send()
        self._runner.send_message(PLAYED, {})

    def _stop(self, **_: Any) -> None:
        if self._driver is not None:
            self._driver.stop()

    def _report(self, request: RecordedRequest) -> None:
        if (request.segment or 0) >= 0:  # not while warming up
            locust_stats.report(self._environment, request)

    def _record(self, record: RecordedRequest | GeneratorSample) -> None:
        self._records.append(
            ("request" if isinstance(record, RecordedRequest) else "client", run_recorder.plain(record))
        )

    def _send_repeatedly(self) -> None:
        while True:
            gevent.sleep(SENDING_SECONDS)
            self._send()

    def _send(self) -> None:
        if self._records:
            records, self._records = self._records, []
            self._runner.send_message(RECORDS, {"records": records})
