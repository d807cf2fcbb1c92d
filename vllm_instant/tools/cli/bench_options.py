"""The options of ``vllm-instant bench``, and what they ask for."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from vllm_instant.tools.bench.plan import (
    BASELINE,
    BASELINE_AGAIN,
    OURS,
    SHORT,
    BadInputError,
    BenchPlan,
    HourlyPrice,
    read_prompts,
)
from vllm_instant.tools.cli.common import Overrides
from vllm_instant.tools.cli.options import CommandOptions
from vllm_instant.tools.measure.servers import START_TIMEOUT


class BenchOptions(CommandOptions):
    """What the user typed."""

    model: Annotated[
        str | None, typer.Argument(help="The model, as for vllm serve; `demo` is the demo's, with its deployment.")
    ] = None
    config: Annotated[
        Path | None, typer.Option("--instant-config", "--config", help="The deployment file that is measured.")
    ] = None
    overrides: Overrides = None
    arms: Annotated[
        list[str] | None,
        typer.Option("--arm", metavar="NAME=FILE|URL", help="One more deployment (a URL with --baseline); repeatable."),
    ] = None
    baseline_url: Annotated[
        str | None,
        typer.Option("--baseline", "--stock", metavar="URL", help="A running server of vLLM alone, instead of MODEL."),
    ] = None
    again_url: Annotated[
        str | None,
        typer.Option("--baseline-again", "--stock-again", metavar="URL", help="A second one, for the noise floor."),
    ] = None
    our_url: Annotated[
        str | None, typer.Option("--ours", metavar="URL", help="The running server that is measured.")
    ] = None
    api_key: Annotated[str | None, typer.Option(help="API key of the running servers; VLLM_API_KEY by default.")] = None
    prompts: Annotated[
        Path | None, typer.Option(help="One prompt per line, or .jsonl; by default built-in classes.")
    ] = None
    concurrency: Annotated[
        str | None, typer.Option(help="Numbers of concurrent users, each measured separately; 1,8,32 by default.")
    ] = None
    rounds: Annotated[
        int | None, typer.Option(min=3, help="Rounds, in each of which every server is measured once; 6 by default.")
    ] = None
    starts: Annotated[
        int | None, typer.Option(min=1, help="Number of starts of each server; 2, or 1 for running servers.")
    ] = None
    tokens: Annotated[int, typer.Option(min=2, help="Length of each answer.")] = 100
    ttft_slo_ms: Annotated[float | None, typer.Option(min=0, help="Goal for the time to the first token.")] = None
    itl_slo_ms: Annotated[float | None, typer.Option(min=0, help="Goal for the mean time between tokens.")] = None
    price_per_hour: Annotated[
        str | None, typer.Option(metavar="2.50USD", help="Price of a server's machine, with the currency.")
    ] = None
    margin: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Allowed difference of two equal servers; 0.1 / √starts by default."),
    ] = None
    capacity: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="A capacity.json of `loadtest capacity`, vLLM's server first: adds its row."),
    ] = None
    until_decided: Annotated[
        bool, typer.Option("--until-decided", help="Add rounds while a row is undecided that rounds can decide.")
    ] = False
    max_rounds: Annotated[
        int | None, typer.Option(min=4, help="Limit of --until-decided; four times --rounds by default.")
    ] = None
    start_timeout: Annotated[
        float,
        typer.Option(min=1, help="Seconds without a new line in a server's log after which its start has failed."),
    ] = START_TIMEOUT
    with_quality: Annotated[bool, typer.Option("--quality/--no-quality", help="Measure quality as well.")] = True
    short: Annotated[
        bool, typer.Option("--short", help="Four users, servers started once, little text for quality.")
    ] = False
    output: Annotated[Path, typer.Option(help="Where results go: this name with .json and .html.")] = Path(
        "vllm-instant-bench"
    )
    fresh: Annotated[bool, typer.Option("--fresh", help="Discard an interrupted run instead of resuming it.")] = False
    compare: Annotated[
        tuple[Path, Path] | None,
        typer.Option(metavar="BEFORE.json AFTER.json", help="Compare two results; exit code 1 if a row is worse."),
    ] = None

    def plan(self) -> BenchPlan:
        """What is measured; raises BadInputError."""
        running = self.baseline_url is not None or self.our_url is not None
        chosen: dict[str, Any] = {
            "concurrency": None if self.concurrency is None else _levels(self.concurrency),
            "rounds": self.rounds,
            "starts": self.starts or (1 if running else None),
            "texts": None if self.with_quality else 0,
            "prompts": None if self.prompts is None else read_prompts(self.prompts),
            "ttft_slo_ms": self.ttft_slo_ms,
            "itl_slo_ms": self.itl_slo_ms,
        }
        given = {key: value for key, value in chosen.items() if value is not None}
        plan = BenchPlan(**{**(SHORT if self.short else {}), **given}, tokens=self.tokens)
        plan = replace(plan, max_rounds=self._max_rounds(plan))
        if plan.starts > plan.rounds:
            raise BadInputError(f"--starts {plan.starts} needs at least as many --rounds, not {plan.rounds}")
        return plan

    def _max_rounds(self, plan: BenchPlan) -> int | None:
        if not self.until_decided:
            if self.max_rounds is not None:
                raise BadInputError("--max-rounds limits --until-decided and does nothing without it")
            return None
        limit = 4 * plan.rounds if self.max_rounds is None else self.max_rounds
        if limit < plan.rounds + plan.starts:
            raise BadInputError(f"--max-rounds {limit} leaves no further rounds after the first {plan.rounds}")
        return limit

    def price(self) -> HourlyPrice | None:
        """What a server's machine costs; raises BadInputError."""
        return None if self.price_per_hour is None else HourlyPrice.parse(self.price_per_hour)

    def named_arms(self) -> dict[str, str]:
        """Files or addresses of further deployments, by name; raises BadInputError."""
        named: dict[str, str] = {}
        for arm in self.arms or []:
            name, found, where = arm.partition("=")
            if not found or not name or not where or name in (BASELINE, BASELINE_AGAIN, OURS, *named):
                taken = f"not {BASELINE!r} or {OURS!r}"
                raise BadInputError(f"--arm {arm} should be NAME=FILE with a name of its own ({taken})")
            named[name] = where
        return named

    def running_urls(self, words: list[str]) -> dict[str, str] | None:
        """Addresses of running servers by name; None where MODEL is to be started. Raises BadInputError.

        Args:
            words: of the command line that are for `vllm serve`.

        """
        if (self.baseline_url is None) != (self.our_url is None):
            raise BadInputError("--baseline and --ours belong together")
        if self.baseline_url is None or self.our_url is None:
            if self.model is None:
                raise BadInputError(
                    "give a MODEL to start, or --baseline and --ours with the addresses of running servers"
                )
            return None
        if self.model is not None:
            given = shlex.join([self.model, *words])
            raise BadInputError(f"{given}: running servers take no MODEL and no words for it")
        if self.starts is not None and self.starts > 1:
            raise BadInputError("--starts is for servers that are started here, not for running ones")
        again = {BASELINE_AGAIN: self.again_url} if self.again_url else {}
        return {BASELINE: self.baseline_url, **again, OURS: self.our_url, **self.named_arms()}


def _levels(text: str) -> tuple[int, ...]:
    try:
        levels = tuple(dict.fromkeys(int(level) for level in text.split(",")))
    except ValueError:
        levels = ()
    if not levels or min(levels) < 1:
        raise BadInputError(f"--concurrency {text} should be numbers of users above 0, as in 1,8,32")
    return levels
