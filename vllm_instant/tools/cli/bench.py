"""``vllm-instant bench``: measures a deployment against vLLM with the same model."""

from __future__ import annotations

import json
import shlex
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from vllm_instant.deployment.secrets import masked, masked_words
from vllm_instant.tools.bench import compare, html_report, report
from vllm_instant.tools.bench.arms import arm_commands
from vllm_instant.tools.bench.capacity_row import capacity_row
from vllm_instant.tools.bench.checkpoint import BenchCheckpoint
from vllm_instant.tools.bench.plan import BadInputError, BenchPlan, HourlyPrice
from vllm_instant.tools.bench.rows import BenchRow, bench_rows, rounds_to_decide
from vllm_instant.tools.bench.session import ExternalServers, ServerProvider, StartedServers, run_bench
from vllm_instant.tools.cli import bench_tables
from vllm_instant.tools.cli.bench_options import BenchOptions
from vllm_instant.tools.cli.common import fail, missing_models_reported, problems_reported, require_vllm
from vllm_instant.tools.cli.options import takes
from vllm_instant.tools.measure.sampling import RefusedError
from vllm_instant.tools.measure.server_info import authorization
from vllm_instant.tools.measure.servers import ServerError, terminable


@takes(BenchOptions)
def bench(options: BenchOptions, words: list[str]) -> None:
    """Measure a deployment against vLLM with the same model: latency, speed, cost, memory and quality.

    Two servers of vLLM alone and the deployment get the same prompts, one server at a time in random order. A row is
    better or worse if it differs by more than the two vLLM servers do, the same if its interval lies within the
    margin, and undecided otherwise. Further words are passed to every `vllm serve`. The same command resumes an
    interrupted run.
    """
    try:
        if options.compare is not None:
            _compare(*options.compare)
            return
        plan, price, named = options.plan(), options.price(), options.named_arms()
        further = [capacity_row(options.capacity)] if options.capacity is not None else []
        urls = options.running_urls(words)
        with ExitStack() as stack:
            stack.enter_context(terminable())
            if urls is not None:
                servers: ServerProvider = ExternalServers(urls, authorization(options.api_key))
                deployments, setup = masked(urls), {"servers": masked(urls)}
            else:
                require_vllm("bench MODEL")
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vllm-instant-bench-")))
                with problems_reported(), missing_models_reported():
                    model, overrides = str(options.model), options.overrides or []
                    commands = arm_commands(model, options.config, overrides, named, words)
                servers = StartedServers(
                    commands.model, commands.words, folder, commands.headers, options.start_timeout
                )
                deployments, setup = commands.deployments, commands.setup()
            _measure(plan, servers, deployments, setup, price, options.margin, options.output, options.fresh, further)
    except (BadInputError, RefusedError, ServerError) as error:
        fail(str(error))
    except KeyboardInterrupt:
        print("vllm-instant: interrupted; the same command resumes the measurement", file=sys.stderr)
        raise typer.Exit(130) from None


def _measure(
    plan: BenchPlan,
    servers: ServerProvider,
    deployments: Mapping[str, str],
    setup: dict[str, Any],
    price: HourlyPrice | None,
    margin: float | None,
    output: Path,
    fresh: bool,
    further: Sequence[BenchRow] = (),
) -> None:
    """Measure what is missing, print the result and save it."""
    unfinished = output.with_name(f"{output.name}.state.jsonl")
    if fresh:
        unfinished.unlink(missing_ok=True)
    state = BenchCheckpoint(unfinished, plan.setup() | setup, servers.names)
    plan = replace(plan, salt=state.salt)
    try:
        done = _run_stages(plan, servers, state, price, margin)
    finally:
        if not state.arm_rounds:
            state.finished()  # nothing to resume
    found = report.bench_record(
        plan,
        state,
        command=shlex.join(["vllm-instant", *masked_words(sys.argv[1:])]),
        price=price,
        margin=margin,
        local=servers.local,
        deployments=deployments,
        rounds=done,
        further=further,
    )
    bench_tables.show(found)
    for suffix, text in ((".json", json.dumps(found, indent=1) + "\n"), (".html", html_report.render(found))):
        file = output.with_name(output.name + suffix)
        file.write_text(text, encoding="utf-8")
        print(f"wrote {file}")
    state.finished()


def _run_stages(
    plan: BenchPlan,
    servers: ServerProvider,
    state: BenchCheckpoint,
    price: HourlyPrice | None,
    margin: float | None,
) -> int:
    """Run stage after stage until every row that rounds can decide is decided; returns the number of rounds."""
    done = 0
    for stage, end in enumerate(plan.stage_ends):
        with _progress((end - done) * len(plan.concurrency) * len(servers.names)) as say:
            if isinstance(servers, StartedServers):
                servers.say = lambda text, say=say: say(text, 0)  # type: ignore[misc]
            run_bench(plan, servers, state, say, stage)
        done = end
        needed = rounds_to_decide(bench_rows(plan, state, price, margin, done))
        if needed is None:
            break
        if done < plan.stage_ends[-1]:
            print(f"undecided after {done} rounds, about {needed} more would decide", file=sys.stderr)
    return done


def _compare(before: Path, after: Path) -> None:
    records = report.read_record(before), report.read_record(after)
    found = compare.row_changes(*records)
    bench_tables.show_changes(*records, found)
    if any(change is not None and change.verdict == "worse" for _, _, change in found):
        raise typer.Exit(1)


@contextmanager
def _progress(total: int) -> Iterator[Any]:
    """A progress bar on standard error; a line for each step where that is no terminal."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=total)

        def say(text: str, done: int) -> None:
            progress.update(task, advance=done, **({"description": text} if text else {}))  # type: ignore[arg-type]
            if text and not console.is_terminal:
                print(text, file=sys.stderr)

        yield say
