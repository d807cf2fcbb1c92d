"""``vllm-instant verify``: whether the answers of a deployment are those of vLLM alone."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer
from rich.console import Console
from rich.text import Text

from vllm_instant.deployment.resolved import installed_plugin
from vllm_instant.deployment.settings import resolve
from vllm_instant.interfaces.deployment import Deployment
from vllm_instant.tools.cli.common import Overrides, fail, print_columns, problems_reported, require_vllm, working
from vllm_instant.tools.cli.verify_guard import verify_guard
from vllm_instant.tools.measure import quality, tasks, verify
from vllm_instant.tools.measure.http_client import get
from vllm_instant.tools.measure.human_eval import SandboxError
from vllm_instant.tools.measure.prompts import held_out_texts
from vllm_instant.tools.measure.sampling import PROMPTS, RefusedError, ServerClient
from vllm_instant.tools.measure.server_info import authorization, read_server_info
from vllm_instant.tools.measure.servers import Server, ServerError, terminable

TASK_TEMPERATURES = (0.0, 0.7)
STYLES = {"pass": "green", "fail": "bold red", "not tested": "yellow", "lossy": "cyan"}


def verify_deployments(
    context: typer.Context,
    model: Annotated[str | None, typer.Argument(help="The model, as for `vllm serve`.")] = None,
    configs: Annotated[
        list[Path] | None,
        typer.Option("--instant-config", "--config", help="Deployment file to check; repeatable."),
    ] = None,
    overrides: Overrides = None,
    stock_url: Annotated[
        str | None,
        typer.Option("--baseline", "--stock", metavar="URL", help="Running server of vLLM alone, not MODEL."),
    ] = None,
    our_url: Annotated[
        str | None, typer.Option("--ours", metavar="URL", help="Running server to check, with --baseline.")
    ] = None,
    draws: Annotated[int, typer.Option(min=100, help="Number of samples per prompt and sampling method.")] = 600,
    tokens: Annotated[
        int, typer.Option(min=2, max=16, help="Number of tokens of a sample that are compared jointly.")
    ] = 4,
    draft_length: Annotated[
        int | None, typer.Option(min=1, help="Number of draft tokens per request; two less than --tokens by default.")
    ] = None,
    false_alarms: Annotated[
        float, typer.Option(min=1e-5, max=0.2, help="Probability that a correct deployment fails.")
    ] = 1e-3,
    prompts: Annotated[
        Path | None, typer.Option(help="File with one prompt per line; six built-in ones by default.")
    ] = None,
    api_key: Annotated[
        str | None, typer.Option(help="API key of the running servers; the variable VLLM_API_KEY by default.")
    ] = None,
    with_quality: Annotated[
        bool, typer.Option("--quality", help="Add the quality report, which lossy deployments always get.")
    ] = False,
    with_tasks: Annotated[
        bool,
        typer.Option(
            "--tasks",
            help="Add a chat model's answers that can be judged: HumanEval (its programs run in a sandbox), facts and "
            "tool calls as JSON, equality of whole answers.",
        ),
    ] = False,
    guard: Annotated[
        Path | None,
        typer.Option(
            "--guard",
            metavar="FILE",
            help="Check the guard of this deployment file instead: planted violations on every path to a client, clean "
            "texts, and the time per token. MODEL is a folder with a tokenizer, by default the demo's.",
        ),
    ] = None,
    violations: Annotated[
        Path | None,
        typer.Option(help="With --guard: file with one text per line to plant; by default the words of `rules`."),
    ] = None,
    planted: Annotated[int, typer.Option(min=10, help="With --guard: number of planted violations.")] = 1000,
    clean: Annotated[int, typer.Option(min=10, help="With --guard: number of clean passages.")] = 10_000,
    output: Annotated[Path | None, typer.Option("--json", help="File for the results as JSON.")] = None,
) -> None:
    """Check deployments against vLLM alone with the same model.

    Greedy answers and answers with a seed must be identical (servers are started in float32, where rounding does not
    decide), and thousands of samples must follow the same joint distribution, at several temperatures, with top-p,
    top-k and penalties, while drafts are kept and refused. Lossy deployments are measured instead of judged. Further
    words are passed to both `vllm serve`. The exit code is 1 when something fails.
    """
    if guard is not None:
        verify_guard(guard, model, violations, planted, clean, output)
        return
    plan = verify.VerifyPlan(_prompts(prompts), draws=draws, tokens=tokens, false_alarms=false_alarms)
    if (stock_url is None) != (our_url is None):
        fail("--baseline and --ours belong together")
    if (model is None) == (stock_url is None):
        fail("give a MODEL to start, or --baseline and --ours with the addresses of running servers")
    if model is not None:
        require_vllm("verify MODEL")
    reports: list[dict[str, Any]] = []
    try:
        if stock_url is not None and our_url is not None:
            reports = [_running(stock_url, our_url, api_key, plan, draft_length, with_quality, with_tasks)]
        elif model is not None:
            extras = with_quality, with_tasks
            reports = _started(model, configs or [], overrides or [], context.args, plan, draft_length, *extras)
    except (ServerError, RefusedError, SandboxError, FileNotFoundError) as error:
        print(f"vllm-instant: {error}", file=sys.stderr)
        raise typer.Exit(2) from None
    if output is not None:
        output.write_text(json.dumps(reports, indent=2) + "\n")
    if any(check["outcome"] == "fail" for report in reports for check in report["checks"]):
        raise typer.Exit(1)


def _prompts(file: Path | None) -> list[str]:
    if file is None:
        return list(PROMPTS)
    try:
        found = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        fail(f"--prompts {file} cannot be read: {error}")
    if not found:
        fail(f"--prompts {file} has no prompts")
    return found


def _running(
    stock: str,
    ours: str,
    api_key: str | None,
    plan: verify.VerifyPlan,
    length: int | None,
    with_quality: bool,
    with_tasks: bool,
) -> dict[str, Any]:
    """Check one running server against another."""
    headers = authorization(api_key)
    arms = [read_server_info(url, headers).arm(headers) for url in (stock, ours)]
    # The server says what it serves: its plugins need not be installed here.
    try:
        answer = get(arms[1].url, "/v1/instant/deployment", headers=headers)
        drafter = answer.json()["slots"]["drafter"]["options"] if answer.status_code == 200 else None
        metrics = get(arms[1].url, "/metrics", headers=headers).text.splitlines()
    except (httpx.HTTPError, ValueError, KeyError):
        raise RefusedError(f"{ours} does not say what it serves") from None
    lossy = any(line.startswith("vllm_instant:plugin_info") and 'lossy="yes"' in line for line in metrics)
    arms[1].draft_length = length if drafter is None else _length(drafter, length, plan.tokens)
    with working("Asking …") as status:
        expected = verify.baseline_answers(arms[0], plan, status.update)
        checks = verify.verify(arms[1], expected, plan, exact=False, lossy=lossy, tick=status.update)
        measured = (
            quality.quality_report(arms[1], arms[0], held_out_texts(40), [*plan.prompts] * 8)
            if with_quality or lossy
            else None
        )
        judged = _judged(arms[1], arms[0], status.update) if with_tasks else []
    return _printed(ours, plan, checks, measured, judged)


def _started(
    model: str,
    configs: list[Path],
    overrides: list[str],
    words: list[str],
    plan: verify.VerifyPlan,
    length: int | None,
    with_quality: bool,
    with_tasks: bool,
) -> list[dict[str, Any]]:
    """Start vLLM alone and each deployment, and check them one after the other."""
    with problems_reported():
        deployments = [(config, resolve(config, overrides)) for config in configs or [None]]  # type: ignore[list-item]
    exact = not any(word.startswith("--dtype") for word in words)
    common = [*words, *(["--dtype", "float32"] if exact else [])]
    reports = []
    with terminable(), ExitStack() as stack, working(f"Starting {model} …") as status:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vllm-instant-verify-")))
        stock_server = stack.enter_context(Server(model, common, log=folder / "stock.log"))
        stock = ServerClient(stock_server.url, stock_server.served_model())
        expected = verify.baseline_answers(stock, plan, status.update)
        for number, (config, deployment) in enumerate(deployments):
            lossy = [slot for slot in deployment.slots if installed_plugin(deployment, slot).plugin.lossy]
            settings = [f"--instant-set={override}" for override in overrides]
            settings += ["--instant-config", str(config)] if config is not None else []
            status.update(f"Starting {config or 'the default deployment'} …")
            server = Server(model, [*common, "--plugins", "vllm_instant", *settings], log=folder / f"ours{number}.log")
            with server:
                ours = ServerClient(
                    server.url, server.served_model(), _length(deployment.slots["drafter"].options, length, plan.tokens)
                )
                checks = verify.verify(ours, expected, plan, exact=exact, lossy=bool(lossy), tick=status.update)
                measured = None
                if with_quality or lossy:
                    status.update("Quality")
                    measured = quality.quality_report(ours, stock, held_out_texts(40), [*plan.prompts] * 8)
                judged = _judged(ours, stock, status.update) if with_tasks else []
            status.stop()
            reports.append(_printed(_described(config, deployment), plan, checks, measured, judged))
            status.start()
    return reports


def _judged(ours: ServerClient, stock: ServerClient, tick: Callable[[str], None]) -> list[tasks.TaskReport]:
    """Both servers' answers to the tasks; greedy ones, and sampled ones, which a lossy rejection sampler changes."""
    asked = tasks.tasks()
    found = []
    for temperature in TASK_TEMPERATURES:
        tick(f"Tasks at temperature {temperature:g}")
        own, other = ([tasks.ask(arm, task, temperature) for task in asked] for arm in (ours, stock))
        found.append(tasks.report(asked, own, other, temperature))
    return found


def _described(config: Path | None, deployment: Deployment) -> str:
    slots = ", ".join(f"{slot}={deployment.slots[slot].plugin}" for slot in ("drafter", "rejection_sampler"))
    return f"{config or 'defaults'}: {slots}"


def _length(drafter: Mapping[str, Any], asked: int | None, tokens: int) -> int:
    """Draft tokens of each request.

    By default as many as leave room in a sample for the token before them, which no draft is behind, and the one that
    follows when all are kept: what goes wrong there is to be seen, too.
    """
    most = int(drafter.get("num_speculative_tokens", tokens))
    return min(asked or max(1, tokens - 2), most)


def _printed(
    title: str,
    plan: verify.VerifyPlan,
    checks: list[verify.VerifyCheck],
    measured: quality.QualityReport | None,
    judged: list[tasks.TaskReport],
) -> dict[str, Any]:
    """Print one deployment's report; returns it as plain data."""
    console = Console(soft_wrap=True)
    console.print(title, style="bold", highlight=False)
    print_columns(
        ("check", "result", ""),
        [(check.name, Text(check.outcome, STYLES[check.outcome]), check.detail) for check in checks],
    )
    draws = plan.draws * len(plan.prompts)
    console.print(
        f"{draws} samples of {plan.tokens} tokens for each way to sample and arm; a deployment without a fault fails "
        f"with a chance of {plan.false_alarms:g} at most.\n"
    )
    if measured is not None:
        console.print(
            f"Quality: perplexity {measured.our_perplexity:.4f}, vLLM {measured.stock_perplexity:.4f} "
            f"(ratio {measured.perplexity_ratio:.4f}, {measured.tokens} tokens of held-out text); divergence at least "
            f"{measured.divergence:.5f} nats per token; vLLM finds a token of our answers likelier than one of its own "
            f"by {measured.answer_gap:.3f} nats ({measured.answers} answers).\n"
        )
    if judged:
        print_columns(
            ("task", "temperature", "vLLM", "ours", "difference [95 %]"),
            [row for report in judged for row in _task_rows(report)],
        )
    return {
        "deployment": title,
        "samples": draws,
        "checks": [asdict(check) for check in checks],
        "quality": None if measured is None else measured.plain(),
        "tasks": [report.plain() for report in judged],
    }


def _task_rows(report: tasks.TaskReport) -> list[tuple[str, ...]]:
    """The shares of right answers of both servers, and of equal whole answers."""
    temperature = f"{report.temperature:g}"
    rows: list[tuple[str, ...]] = []
    for row in report.marks:
        change = row.difference
        shown = f"{change.mean:+.1%} [{change.low:+.1%}, {change.high:+.1%}]"
        rows.append((f"{row.task}: {row.mark}", temperature, f"{row.baseline:.1%}", f"{row.ours:.1%}", shown))
    for equality in report.equality:
        rows.append((f"{equality.task}: equal answers", temperature, "", f"{equality.equal.mean:.1%}", ""))
    return rows
