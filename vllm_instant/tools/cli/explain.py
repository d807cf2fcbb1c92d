"""``vllm-instant explain``: the newest decisions of a running server's policies, in the policies' own words."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import typer

from vllm_instant.tools.cli.common import fail, print_columns, printable
from vllm_instant.tools.measure.sampling import RefusedError
from vllm_instant.tools.measure.server_info import authorization, read_decisions
from vllm_instant.tools.measure.speedup_estimate import estimate_speedup

Decision = Mapping[str, Any]


def explain(
    url: Annotated[str, typer.Option(help="Address of the server.")] = "http://127.0.0.1:8000",
    last: Annotated[int, typer.Option(min=1, max=2048, help="Number of the newest decisions to show.")] = 20,
    request: Annotated[
        str | None, typer.Option(help="Show only decisions about this request, by the whole id of its answer.")
    ] = None,
    queue: Annotated[
        bool, typer.Option("--queue", help="Show the decisions of the scheduling policy: why requests started when.")
    ] = False,
    guard: Annotated[
        bool, typer.Option("--guard", help="Show what the guard stopped or replaced: by which rule, where, how late.")
    ] = False,
    escalation: Annotated[
        bool, typer.Option("--escalation", help="Show which end answered the requests, and why.")
    ] = False,
    api_key: Annotated[
        str | None, typer.Option(help="API key of the server; the variable VLLM_API_KEY by default.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the server's answer as JSON.")] = False,
) -> None:
    """Show the newest decisions of a server's policies: what was expected, what was chosen, what the step then did."""
    about = "guard" if guard else "escalation" if escalation else "decisions"
    answer = _ask(url, last, request, queue, about, api_key)
    if as_json:
        print(json.dumps(answer, indent=2))
        return
    engines = [engine for engine in answer["engines"] if engine["decisions"]]
    if not engines:
        found = f"no decision about request {request}" if request else "no decisions"
        policy = "policy" if about == "decisions" else about
        print(f"The server has {found}: its {policy} has decided nothing yet, or does not explain itself.")
        return
    for engine in engines:
        if len(answer["engines"]) > 1:
            print(printable(f"engine {engine['engine']}"))
        _print_table(engine["decisions"])
        if request is None and not queue and about == "decisions":
            _print_speedup(engine["decisions"])
    decisions = [decision for engine in engines for decision in engine["decisions"]]
    for explanation in sorted({str(d["explanation"]) for d in decisions if d.get("explanation")}):
        print(printable(explanation))


def _ask(url: str, last: int, request: str | None, queue: bool, about: str, api_key: str | None) -> dict[str, Any]:
    """The server's answer; without one the command ends with one sentence."""
    parameters: dict[str, Any] = {"last": last}
    parameters |= {"request_id": request} if request else {}
    parameters |= {"queue": True} if queue else {}
    try:
        return read_decisions(url, parameters, authorization(api_key), about)
    except RefusedError as error:
        fail(str(error))


def _print_table(decisions: Sequence[Decision]) -> None:
    """One row per decision, under the headings of the newest one."""
    rows = [_row(decision) for decision in decisions]
    headings = list(rows[-1])
    print_columns(headings, ([row.get(heading, "") for heading in headings] for row in rows))


def _row(decision: Decision) -> dict[str, str]:
    """The policy's summary of a decision; without one the decision's own keys and values."""
    summary = decision.get("summary")
    if isinstance(summary, Mapping):
        return {str(heading): str(text) for heading, text in summary.items()}
    return {str(key): value if isinstance(value, str) else json.dumps(value) for key, value in decision.items()}


def _print_speedup(decisions: Sequence[Decision]) -> None:
    estimate = estimate_speedup(decisions)
    if estimate is not None and estimate.drafting:
        print(
            f"{estimate.steps} of these steps read no prompts, {estimate.drafting} of them had drafts: "
            f"{estimate.speed:.2f} times the tokens per second of never drafting, by the steps beside them"
        )
