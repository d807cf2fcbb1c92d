"""``vllm-instant escalation``: ask both ends, learn a rule, and judge it beside its baselines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from vllm_instant.tools.cli.common import fail, print_columns, require, working

app = typer.Typer(help="Which requests a deeper model answers better.", no_args_is_help=True)

Answers = Annotated[Path, typer.Argument(help="File with prompts and the answers of both ends, one JSON per line.")]
Score = Annotated[
    str | None,
    typer.Option(
        help="How answers are scored: exact (against reference), judge, or your function as package.module:function; "
        "without it the lines have fast_score and deep_score."
    ),
]
JudgeUrl = Annotated[str | None, typer.Option(help="Address of the judge's OpenAI-compatible server.")]
JudgeModel = Annotated[str | None, typer.Option(help="Name of the judge's model.")]
ApiKey = Annotated[str | None, typer.Option(help="API key of these servers; the variable VLLM_API_KEY by default.")]
MaxLoss = Annotated[
    float, typer.Option(min=0, max=1, help="Mean score that may be lost against always deep, for the threshold.")
]
Output = Annotated[Path | None, typer.Option("--json", help="Write the report to this file.")]


@app.command()
def ask(
    prompts: Annotated[Path, typer.Argument(help="File with prompt or messages, one JSON per line.")],
    answers: Annotated[Path, typer.Argument(help="File to write.")],
    fast: Annotated[str, typer.Option(help="Address of the fast server.")],
    deep: Annotated[str, typer.Option(help="Address of the deep server.")],
    max_tokens: Annotated[int, typer.Option(min=1, help="Limit of each answer.")] = 256,
    concurrency: Annotated[int, typer.Option(min=1, max=64, help="Prompts at once.")] = 1,
    api_key: ApiKey = None,
) -> None:
    """Ask both ends the same prompts greedily, and write their answers with seconds and numbers of tokens."""
    from vllm_instant.tools.escalation.ask import End, ask_both
    from vllm_instant.tools.escalation.examples import read_lines
    from vllm_instant.tools.measure.http_client import sync_client
    from vllm_instant.tools.measure.sampling import RefusedError
    from vllm_instant.tools.measure.server_info import authorization, read_server_info

    headers = authorization(api_key)
    try:
        lines = list(read_lines(prompts))

        def end_at(url: str) -> End:
            info = read_server_info(url, headers)
            return End(sync_client(info.url, timeout=600, headers=headers), info.name, max_tokens)

        ends = end_at(fast), end_at(deep)
        with working("Asking …") as status:
            count = ask_both(lines, *ends, answers, concurrency, lambda done: status.update(f"{done} of {len(lines)}"))
    except (RefusedError, ValueError) as error:
        fail(str(error))
    print(f"Wrote {count} prompts with both answers to {answers}.")


@app.command()
def report(
    answers: Answers,
    rule: Annotated[
        Path | None, typer.Option(help="A rule to judge, not learned from these prompts; without it one is learned.")
    ] = None,
    max_loss: MaxLoss = 0.02,
    score: Score = None,
    judge_url: JudgeUrl = None,
    judge_model: JudgeModel = None,
    api_key: ApiKey = None,
    output: Output = None,
) -> None:
    """Show what a rule brings on held-out prompts beside its baselines; exit code 1 where it is not recommended."""
    from vllm_instant.escalation.learned_rule import read_rule
    from vllm_instant.tools.escalation.report import judge

    _require()
    try:
        examples, cost = _examples(answers, score, judge_url, judge_model, api_key)
        given = read_rule(rule) if rule is not None else None
        with working("Judging …"):
            found = judge(examples, cost, max_loss, given)
    except ValueError as error:
        fail(str(error))
    _show(found, output)
    if found.reasons:
        raise typer.Exit(1)


@app.command()
def learn(
    answers: Answers,
    rule: Annotated[Path, typer.Argument(help="File to write, for [escalation] rule_file.")],
    max_loss: MaxLoss = 0.02,
    score: Score = None,
    judge_url: JudgeUrl = None,
    judge_model: JudgeModel = None,
    api_key: ApiKey = None,
    output: Output = None,
) -> None:
    """Learn a rule, and write it if it beats its baselines on held-out prompts."""
    from vllm_instant.tools.escalation.learning import fit_rule, plain
    from vllm_instant.tools.escalation.report import judge

    _require()
    try:
        examples, cost = _examples(answers, score, judge_url, judge_model, api_key)
        with working("Learning …"):
            found = judge(examples, cost, max_loss)
            fitted = fit_rule(examples)
    except ValueError as error:
        fail(str(error))
    _show(found, output)
    if found.reasons:
        raise typer.Exit(1)
    held_out = {key: value for key, value in found.plain().items() if key != "frontier"}
    learned = fitted.model_copy(update={"threshold": found.threshold, "learned_from": held_out})
    rule.write_text(json.dumps(plain(learned)) + "\n", encoding="utf-8")
    print(f'Wrote {rule}: serve it with [escalation] plugin = "learned", rule_file = "{rule}"')


def _require() -> None:
    require("escalation", {"sklearn": "scikit-learn"}, extra="escalation")


def _examples(
    answers: Path, score: str | None, judge_url: str | None, judge_model: str | None, api_key: str | None
) -> tuple[list[Any], str]:
    from vllm_instant.tools.escalation.examples import Judge, exact_match, function_scorer, read_examples
    from vllm_instant.tools.measure.server_info import authorization

    if score == "judge":
        if judge_url is None or judge_model is None:
            raise ValueError("--score judge needs --judge-url and --judge-model")
        return read_examples(answers, Judge(judge_url, judge_model, authorization(api_key)))
    scorer = None if score is None else exact_match if score == "exact" else function_scorer(score)
    return read_examples(answers, scorer)


def _show(found: Any, output: Path | None) -> None:
    print(
        f"{found.num_prompts} prompts, the deep answer is better for {found.num_deep_better}; cost: {found.cost}; all "
        "numbers are of prompts that were held out"
    )
    print_columns(
        ("policy", "deep answers", "mean score", "mean cost"),
        [
            ("always fast", "0 %", str(found.fast), f"{found.fast_cost:.3f}"),
            ("always deep", "100 %", str(found.deep), f"{found.deep_cost:.3f}"),
            (f"rule, from {found.threshold:.3f}", f"{found.share:.0%}", str(found.rule), f"{found.rule_cost:.3f}"),
        ],
    )
    print()
    print_columns(
        ("extra cost", "mean cost", "learned", "random mix", "prompt length"),
        [(f"{p.share:.0%}", f"{p.cost:.3f}", str(p.learned), str(p.random_mix), str(p.length)) for p in found.frontier],
    )
    print()
    print(f"More than a random mix at equal cost: {found.over_random_mix}")
    print(f"More than by the prompt's length at equal cost: {found.over_length}")
    print(f"Less than always deep: {found.loss}")
    for reason in found.reasons:
        print(f"Not recommended: {reason}.")
    if not found.reasons:
        print("Recommended.")
    if output is not None:
        output.write_text(json.dumps(found.plain(), indent=2) + "\n", encoding="utf-8")
