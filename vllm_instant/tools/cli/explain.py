"""``vllm-instant explain``: why a running server drafts as it does."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from vllm_instant.tools.cli.common import fail, print_columns
from vllm_instant.tools.measure.sampling import RefusedError
from vllm_instant.tools.measure.server_info import authorization, read_decisions
from vllm_instant.tools.measure.speedup_estimate import estimate_speedup

REASONS = {
    "learning": "nothing measured yet: the first steps show what one costs without drafts",
    "draft": "drafting brings more tokens a second",
    "draft+probe": "as draft, and one request without drafts tries one, in case it has become predictable",
    "reference": "one step without drafts, to know what they are compared with",
    "off": "no drafting: the best plan would bring fewer tokens a second",
    "probe": "off, but a request tries the drafter, in case it has become better",
    "follow-up": "the last probe was accepted more often than expected: more of it at once",
    "costs": "what so many drafts cost is uncertain, and they may be the best plan: tried to learn it",
    "pinned": "all requests have lengths that their clients asked for",
    "trial": "off, but drafting is so nearly as good that a whole step of it is tried",
    "calibrating": "drafting at random, to learn what steps cost",
}


def explain(
    url: Annotated[str, typer.Option(help="The server, without /v1.")] = "http://127.0.0.1:8000",
    last: Annotated[int, typer.Option(min=1, max=2048, help="How many of the newest decisions.")] = 20,
    request: Annotated[
        str | None, typer.Option(help="Only decisions about this request: the id of its answer, or its beginning.")
    ] = None,
    queue: Annotated[
        bool, typer.Option("--queue", help="The queue instead: why requests started when they did.")
    ] = False,
    api_key: Annotated[str | None, typer.Option(help="The server's API key; VLLM_API_KEY by default.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print what the server answers.")] = False,
) -> None:
    """Show the newest decisions of a server's policies: what was expected, what was chosen, what came out."""
    parameters: dict[str, Any] = {"last": last} | ({"request_id": request} if request else {})
    parameters |= {"queue": True} if queue else {}
    try:
        answer = read_decisions(url, parameters, authorization(api_key))
    except RefusedError as error:
        fail(str(error))
    if as_json:
        print(json.dumps(answer, indent=2))
        return
    decided = [engine for engine in answer["engines"] if engine["decisions"]]
    if not decided:
        what = f"no decision about request {request}" if request else "no decisions"
        print(f"The server keeps {what}: its policy has decided nothing yet, or does not explain itself.")
        return
    for engine in decided:
        if len(answer["engines"]) > 1:
            print(f"engine {engine['engine']}")
        if queue:
            print_columns(_QUEUE_HEADINGS, (_queue_row(decision) for decision in engine["decisions"]))
            continue
        headings = list(_HEADINGS)
        if request:
            headings[3:5] = ["its acceptance", "its drafts"]
        print_columns(headings, (_row(decision, of_request=request is not None) for decision in engine["decisions"]))
        found = estimate_speedup(engine["decisions"]) if request is None else None
        if found is not None and found.drafting:
            print(
                f"{found.steps} of these steps read no prompts, {found.drafting} of them had drafts: "
                f"{found.speed:.2f} times the tokens a second of never drafting, by the steps beside them"
            )
    for reason in sorted({d.get("reason") for engine in decided for d in engine["decisions"]} & REASONS.keys()):
        print(f"{reason}: {REASONS[reason]}")


_HEADINGS = (
    "step",
    "reason",
    "requests",
    "acceptance",
    "drafts",
    "worth from",
    "gain",
    "expected tokens in ms",
    "without drafts ms",
    "came tokens in ms",
    "accepted",
)


def _row(decision: dict[str, Any], of_request: bool) -> list[str]:
    """One decision as a line; with ``of_request`` acceptance and drafts are those of the one request."""
    expected, outcome, rows = decision["expected"], decision["outcome"], decision["requests"]
    acceptance = sum(row["acceptance"] for row in rows) / len(rows)
    return [
        str(decision["step"]),
        decision["reason"],
        str(decision["num_requests"]),
        f"{acceptance:.0%}",
        str(rows[0]["draft_tokens"] if of_request else decision["draft_tokens"]),
        f"{expected['worth_from']:.0%}" if expected["worth_from"] < 1 else "–",
        f"{expected['gain']:.2f}×",
        f"{expected['tokens']:.1f} in {expected['milliseconds']:.1f}",
        f"{expected['milliseconds_without_drafts']:.1f}",
        f"{outcome['tokens']} in {outcome['milliseconds']:.1f}" if outcome else "…",
        f"{outcome['accepted']} of {outcome['drafted']}" if outcome and outcome["drafted"] else "–",
    ]


_QUEUE_HEADINGS = ("request", "waited ms", "at most ms", "expected tokens", "tokens", "older ones left waiting")


def _queue_row(decision: dict[str, Any]) -> list[str]:
    tokens = decision["tokens"]
    bound = decision["bound_ms"]
    return [
        decision["request_id"],
        f"{decision['waited_ms']:.0f}",
        "–" if bound is None else f"{bound:.0f}",
        f"{decision['expected_tokens']:.0f}",
        "…" if tokens is None else str(tokens),
        str(decision["older_waiting"]),
    ]
