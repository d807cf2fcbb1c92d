"""``vllm-instant bench``: what a deployment does for a model, beside stock vLLM."""

from __future__ import annotations

import json
import shlex
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from vllm_instant.deployment.settings import resolve
from vllm_instant.tools.bench import compare, html_report, report
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
from vllm_instant.tools.bench.session import ExternalServers, ServerProvider, StartedServers, run_bench
from vllm_instant.tools.cli import bench_tables
from vllm_instant.tools.cli.common import Overrides, fail, missing_models_reported, problems_reported, require_vllm
from vllm_instant.tools.measure.sampling import RefusedError
from vllm_instant.tools.measure.server_info import authorization
from vllm_instant.tools.measure.servers import ServerError, terminable, words_of

DEMO = "demo"


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
        typer.Option("--arm", metavar="NAME=FILE|URL", help="One more deployment (a URL with --stock); repeatable."),
    ] = None,
    stock_url: Annotated[
        str | None, typer.Option("--stock", metavar="URL", help="A running server of stock vLLM, instead of MODEL.")
    ] = None,
    again_url: Annotated[
        str | None, typer.Option("--stock-again", metavar="URL", help="A second one, which shows the noise floor.")
    ] = None,
    our_url: Annotated[
        str | None, typer.Option("--ours", metavar="URL", help="The running server that is measured.")
    ] = None,
    api_key: Annotated[
        str | None, typer.Option(help="API key of the running servers; VLLM_API_KEY by default.")
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="One prompt a line, or .jsonl; by default built-in classes.")
    ] = None,
    concurrency: Annotated[
        str | None, typer.Option(help="Numbers of users, each measured on its own; 1,8,32 by default.")
    ] = None,
    rounds: Annotated[
        int | None, typer.Option(min=3, help="Rounds, in each of which every server takes a turn; 6 by default.")
    ] = None,
    starts: Annotated[
        int | None, typer.Option(min=1, help="How often each server is started anew; 2, or 1 for running servers.")
    ] = None,
    tokens: Annotated[int, typer.Option(min=2, help="Length of each answer.")] = 100,
    ttft_slo_ms: Annotated[float | None, typer.Option(min=0, help="Goal for the time to the first token.")] = None,
    itl_slo_ms: Annotated[float | None, typer.Option(min=0, help="Goal for the mean time between tokens.")] = None,
    price_per_hour: Annotated[
        str | None, typer.Option(metavar="2.50USD", help="Price of a server's machine, with the currency.")
    ] = None,
    margin: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="What two equal servers may differ by; 0.1 by the root of --starts."),
    ] = None,
    with_quality: Annotated[bool, typer.Option("--quality/--no-quality", help="Measure quality, too.")] = True,
    short: Annotated[
        bool, typer.Option("--short", help="Four users, servers started once, little text for quality.")
    ] = False,
    output: Annotated[Path, typer.Option(help="Where results go: this name with .json and .html.")] = Path(
        "vllm-instant-bench"
    ),
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Drop an interrupted run instead of going on with it.")
    ] = False,
    compare: Annotated[
        tuple[Path, Path] | None,
        typer.Option(metavar="BEFORE.json AFTER.json", help="Compare two results; exit code 1 if a row is worse."),
    ] = None,
) -> None:
    """Measure a deployment beside stock vLLM with the same model: latency, speed, cost, memory and quality.

    Two stock servers and the deployment run side by side and take turns in random order with the same prompts; a row is
    better or worse only if it differs by more than the two stock servers do. Further words are passed to every
    `vllm serve`. An interrupted run goes on when the same command is given again.
    """
    try:
        if compare is not None:
            _compare(*compare)
            return
        chosen: dict[str, Any] = {
            "concurrency": None if concurrency is None else _levels(concurrency),
            "rounds": rounds,
            "starts": starts or (1 if stock_url is not None else None),
            "texts": None if with_quality else 0,
            "prompts": None if prompts is None else read_prompts(prompts),
            "ttft_slo_ms": ttft_slo_ms,
            "itl_slo_ms": itl_slo_ms,
        }
        given = {key: value for key, value in chosen.items() if value is not None}
        plan = BenchPlan(**{**(SHORT if short else {}), **given}, tokens=tokens)
        if plan.starts > plan.rounds:
            raise BadInputError(f"--starts {plan.starts} needs at least as many --rounds, not {plan.rounds}")
        price = None if price_per_hour is None else HourlyPrice.parse(price_per_hour)
        named = _named(arms or [])
        if (stock_url is None) != (our_url is None):
            raise BadInputError("--stock and --ours belong together")
        if model is None and stock_url is None:
            raise BadInputError("give a MODEL to start, or --stock and --ours with the addresses of running servers")
        if model is not None and stock_url is not None:
            words = shlex.join([model, *context.args])
            raise BadInputError(f"{words}: running servers take no MODEL and no words for it")
        if model is not None:
            require_vllm("bench MODEL")
        with ExitStack() as stack:
            stack.enter_context(terminable())
            if stock_url is not None and our_url is not None:
                if plan.starts > 1:
                    raise BadInputError("--starts is for servers that are started here, not for running ones")
                urls = {
                    BASELINE: stock_url,
                    **({BASELINE_AGAIN: again_url} if again_url else {}),
                    OURS: our_url,
                    **named,
                }
                servers: ServerProvider = ExternalServers(urls, authorization(api_key))
                deployments, setup = dict(urls), {"servers": urls}
            else:
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vllm-instant-bench-")))
                servers, deployments, setup = _started(str(model), config, overrides or [], named, context.args, folder)
            _measure(plan, servers, deployments, setup, price, margin, output, fresh)
    except (BadInputError, RefusedError, ServerError) as error:
        fail(str(error))
    except KeyboardInterrupt:
        print("vllm-instant: interrupted; the same command goes on with what was measured", file=sys.stderr)
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
) -> None:
    """Run what is not there yet, print it and save it."""
    unfinished = output.with_name(f"{output.name}.state.jsonl")
    if fresh:
        unfinished.unlink(missing_ok=True)
    state = BenchCheckpoint(unfinished, plan.setup() | setup, servers.names)
    plan = replace(plan, salt=state.salt)
    try:
        with _progress(plan.rounds * len(plan.concurrency) * len(servers.names)) as say:
            run_bench(plan, servers, state, say)
    finally:
        if not state.turns:
            state.finished()  # nothing to go on with
    found = report.bench_record(
        plan,
        state,
        command=shlex.join(["vllm-instant", *sys.argv[1:]]),
        price=price,
        margin=margin,
        local=servers.local,
        deployments=deployments,
    )
    bench_tables.show(found)
    for suffix, text in ((".json", json.dumps(found, indent=1) + "\n"), (".html", html_report.render(found))):
        file = output.with_name(output.name + suffix)
        file.write_text(text, encoding="utf-8")
        print(f"wrote {file}")
    state.finished()


def _started(
    model: str,
    config: Path | None,
    overrides: list[str],
    named: Mapping[str, str],
    words: list[str],
    folder: Path,
) -> tuple[ServerProvider, dict[str, str], dict[str, Any]]:
    """Servers to start: stock vLLM twice with the engine arguments of the first deployment, and each deployment."""
    if model == DEMO and not Path(model).exists():
        from vllm_instant.tools.demo import assets, session

        with missing_models_reported():
            pair = assets.prepare()
        model, config = str(pair.target), config or session.DEPLOYMENT
        overrides = [f"drafter.model={pair.draft}", *overrides]
    with problems_reported():
        deployment = resolve(config, overrides)
        for file in named.values():
            resolve(Path(file), overrides)
    # The drafter is what a deployment adds; everything else of the engine is the same for both.
    shared = {key: value for key, value in deployment.vllm.items() if key not in ("speculative_config", "model")}
    stock = [*words_of(shared), *words]
    settings = [f"--instant-set={override}" for override in overrides]
    commands, deployments = (
        {BASELINE: stock, BASELINE_AGAIN: stock},
        {BASELINE: shlex.join(stock), BASELINE_AGAIN: shlex.join(stock)},
    )
    files: dict[str, Path | None] = {OURS: config, **{name: Path(file) for name, file in named.items()}}
    for name, chosen_file in files.items():
        chosen = ["--instant-config", str(chosen_file)] if chosen_file is not None else []
        commands[name] = [*words, "--plugins", "vllm_instant", *chosen, *settings]
        text = chosen_file.read_text(encoding="utf-8") if chosen_file is not None else "the defaults"
        deployments[name] = "\n".join([text.rstrip(), *(f"# --instant-set {override}" for override in overrides)])
    return StartedServers(model, commands, folder), deployments, {"model": model, "deployments": deployments}


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
def _progress(turns: int) -> Iterator[Any]:
    """A bar of turns on standard error; a line for each step where that is no terminal."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=turns)

        def say(text: str, done: int) -> None:
            progress.update(task, advance=done, **({"description": text} if text else {}))  # type: ignore[arg-type]
            if text and not console.is_terminal:
                print(text, file=sys.stderr)

        yield say
