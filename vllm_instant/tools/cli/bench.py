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
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from vllm_instant.tools.bench import compare, html_report, report
from vllm_instant.tools.bench.arms import arm_commands
from vllm_instant.tools.bench.checkpoint import BenchCheckpoint
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
from vllm_instant.tools.bench.rows import bench_rows, rounds_to_decide
from vllm_instant.tools.bench.session import ExternalServers, ServerProvider, StartedServers, run_bench
from vllm_instant.tools.cli import bench_tables
from vllm_instant.tools.cli.common import Overrides, fail, missing_models_reported, problems_reported, require_vllm
from vllm_instant.tools.measure.sampling import RefusedError
from vllm_instant.tools.measure.server_info import authorization
from vllm_instant.tools.measure.servers import START_TIMEOUT, ServerError, terminable


def bench(
    context: typer.Context,
    model: Annotated[
        str | None, typer.Argument(help="The model, as for vllm serve; `demo` is the demo's, with its deployment.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option("--instant-config", "--config", help="The deployment file that is measured.")
    ] = None,
    overrides: Overrides = None,
    arms: Annotated[
        list[str] | None,
        typer.Option("--arm", metavar="NAME=FILE|URL", help="One more deployment (a URL with --baseline); repeatable."),
    ] = None,
    baseline_url: Annotated[
        str | None,
        typer.Option("--baseline", "--stock", metavar="URL", help="A running server of vLLM alone, instead of MODEL."),
    ] = None,
    again_url: Annotated[
        str | None,
        typer.Option("--baseline-again", "--stock-again", metavar="URL", help="A second one, for the noise floor."),
    ] = None,
    our_url: Annotated[
        str | None, typer.Option("--ours", metavar="URL", help="The running server that is measured.")
    ] = None,
    api_key: Annotated[
        str | None, typer.Option(help="API key of the running servers; VLLM_API_KEY by default.")
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="One prompt per line, or .jsonl; by default built-in classes.")
    ] = None,
    concurrency: Annotated[
        str | None, typer.Option(help="Numbers of concurrent users, each measured separately; 1,8,32 by default.")
    ] = None,
    rounds: Annotated[
        int | None, typer.Option(min=3, help="Rounds, in each of which every server is measured once; 6 by default.")
    ] = None,
    starts: Annotated[
        int | None, typer.Option(min=1, help="Number of starts of each server; 2, or 1 for running servers.")
    ] = None,
    tokens: Annotated[int, typer.Option(min=2, help="Length of each answer.")] = 100,
    ttft_slo_ms: Annotated[float | None, typer.Option(min=0, help="Goal for the time to the first token.")] = None,
    itl_slo_ms: Annotated[float | None, typer.Option(min=0, help="Goal for the mean time between tokens.")] = None,
    price_per_hour: Annotated[
        str | None, typer.Option(metavar="2.50USD", help="Price of a server's machine, with the currency.")
    ] = None,
    margin: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Allowed difference of two equal servers; 0.1 / √starts by default."),
    ] = None,
    until_decided: Annotated[
        bool, typer.Option("--until-decided", help="Add rounds while a row is undecided that rounds can decide.")
    ] = False,
    max_rounds: Annotated[
        int | None, typer.Option(min=4, help="Limit of --until-decided; four times --rounds by default.")
    ] = None,
    start_timeout: Annotated[
        float,
        typer.Option(min=1, help="Seconds without a new line in a server's log after which its start has failed."),
    ] = START_TIMEOUT,
    with_quality: Annotated[bool, typer.Option("--quality/--no-quality", help="Measure quality as well.")] = True,
    short: Annotated[
        bool, typer.Option("--short", help="Four users, servers started once, little text for quality.")
    ] = False,
    output: Annotated[Path, typer.Option(help="Where results go: this name with .json and .html.")] = Path(
        "vllm-instant-bench"
    ),
    fresh: Annotated[bool, typer.Option("--fresh", help="Discard an interrupted run instead of resuming it.")] = False,
    compare: Annotated[
        tuple[Path, Path] | None,
        typer.Option(metavar="BEFORE.json AFTER.json", help="Compare two results; exit code 1 if a row is worse."),
    ] = None,
) -> None:
    """Measure a deployment against vLLM with the same model: latency, speed, cost, memory and quality.

    Two servers of vLLM alone and the deployment get the same prompts, one server at a time in random order. A row is
    better or worse if it differs by more than the two vLLM servers do, the same if its interval lies within the
    margin, and undecided otherwise. Further words are passed to every `vllm serve`. The same command resumes an
    interrupted run.
    """
    try:
        if compare is not None:
            _compare(*compare)
            return
        running = baseline_url is not None or our_url is not None
        chosen: dict[str, Any] = {
            "concurrency": None if concurrency is None else _levels(concurrency),
            "rounds": rounds,
            "starts": starts or (1 if running else None),
            "texts": None if with_quality else 0,
            "prompts": None if prompts is None else read_prompts(prompts),
            "ttft_slo_ms": ttft_slo_ms,
            "itl_slo_ms": itl_slo_ms,
        }
        given = {key: value for key, value in chosen.items() if value is not None}
        plan = BenchPlan(**{**(SHORT if short else {}), **given}, tokens=tokens)
        plan = replace(plan, max_rounds=_max_rounds(plan, until_decided, max_rounds))
        price = None if price_per_hour is None else HourlyPrice.parse(price_per_hour)
        named = _named(arms or [])
        _check(plan, model, baseline_url, our_url, context.args)
        with ExitStack() as stack:
            stack.enter_context(terminable())
            if baseline_url is not None and our_url is not None:
                urls = {
                    BASELINE: baseline_url,
                    **({BASELINE_AGAIN: again_url} if again_url else {}),
                    OURS: our_url,
                    **named,
                }
                servers: ServerProvider = ExternalServers(urls, authorization(api_key))
                deployments, setup = dict(urls), {"servers": urls}
            else:
                require_vllm("bench MODEL")
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vllm-instant-bench-")))
                with problems_reported(), missing_models_reported():
                    commands = arm_commands(str(model), config, overrides or [], named, context.args)
                servers = StartedServers(commands.model, commands.words, folder, commands.headers, start_timeout)
                deployments, setup = commands.deployments, commands.setup()
            _measure(plan, servers, deployments, setup, price, margin, output, fresh)
    except (BadInputError, RefusedError, ServerError) as error:
        fail(str(error))
    except KeyboardInterrupt:
        print("vllm-instant: interrupted; the same command resumes the measurement", file=sys.stderr)
        raise typer.Exit(130) from None


def _check(
    plan: BenchPlan, model: str | None, baseline_url: str | None, our_url: str | None, words: Sequence[str]
) -> None:
    """Raise BadInputError where options contradict each other."""
    if plan.starts > plan.rounds:
        raise BadInputError(f"--starts {plan.starts} needs at least as many --rounds, not {plan.rounds}")
    if (baseline_url is None) != (our_url is None):
        raise BadInputError("--baseline and --ours belong together")
    if model is None and baseline_url is None:
        raise BadInputError("give a MODEL to start, or --baseline and --ours with the addresses of running servers")
    if model is not None and baseline_url is not None:
        raise BadInputError(f"{shlex.join([model, *words])}: running servers take no MODEL and no words for it")
    if baseline_url is not None and plan.starts > 1:
        raise BadInputError("--starts is for servers that are started here, not for running ones")


def _max_rounds(plan: BenchPlan, until_decided: bool, max_rounds: int | None) -> int | None:
    if not until_decided:
        if max_rounds is not None:
            raise BadInputError("--max-rounds limits --until-decided and does nothing without it")
        return None
    limit = 4 * plan.rounds if max_rounds is None else max_rounds
    if limit < plan.rounds + plan.starts:
        raise BadInputError(f"--max-rounds {limit} leaves no further rounds after the first {plan.rounds}")
    return limit


def _measure(
    plan: BenchPlan,
    servers: ServerProvider,
    deployments: Mapping[str, str],
    setup: dict[str, Any],
    price: HourlyPrice | None,
    margin: float | None,
    output: Path,
    fresh: bool,
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
        command=shlex.join(["vllm-instant", *sys.argv[1:]]),
        price=price,
        margin=margin,
        local=servers.local,
        deployments=deployments,
        rounds=done,
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


def _levels(text: str) -> tuple[int, ...]:
    try:
        levels = tuple(dict.fromkeys(int(level) for level in text.split(",")))
    except ValueError:
        levels = ()
    if not levels or min(levels) < 1:
        raise BadInputError(f"--concurrency {text} should be numbers of users above 0, as in 1,8,32")
    return levels


def _named(arms: list[str]) -> dict[str, str]:
    named: dict[str, str] = {}
    for arm in arms:
        name, found, where = arm.partition("=")
        if not found or not name or not where or name in (BASELINE, BASELINE_AGAIN, OURS, *named):
            taken = f"not {BASELINE!r} or {OURS!r}"
            raise BadInputError(f"--arm {arm} should be NAME=FILE with a name of its own ({taken})")
        named[name] = where
    return named


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
