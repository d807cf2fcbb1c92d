"""``vllm-instant experts``: traces, groups and quality of a model's experts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer

from vllm_instant.tools.cli import experts_trace
from vllm_instant.tools.cli.common import fail, missing_models_reported, print_columns, require, working

if TYPE_CHECKING:
    from vllm_instant.tools.moe.eval_windows import EvalWindows
    from vllm_instant.tools.moe.placement import PlacementComparison
    from vllm_instant.tools.moe.quality_budget_curve import CurvePoint, Restriction

app = typer.Typer(
    help="Trace the experts that a model uses, group them, and report the quality with fewer of them.",
    no_args_is_help=True,
)
app.command(name="trace", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(
    experts_trace.trace
)

DEMO = "demo"


@app.command()
def learn(
    traces: Annotated[list[Path], typer.Argument(help="Files from `vllm-instant experts trace`, of one model.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="File for the clusters (JSON).")],
    clusters: Annotated[
        int | None, typer.Option(min=1, help="Number of clusters per layer; chosen from the data by default.")
    ] = None,
    devices: Annotated[str, typer.Option(help="Numbers of devices to place experts on.")] = "2,4,8",
    eplb: Annotated[
        Path | None, typer.Option(help="Folder for the placements in the form of vLLM's EPLB (NumPy files).")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the random splits and starts.")] = 0,
) -> None:
    """Group the experts of every layer into super-experts, and place them on devices.

    All printed figures are measured on held-out requests.
    """
    require("experts learn", {"sklearn": "scikit-learn"}, extra="experts")
    from vllm_instant.moe.routing_trace import Trace, TraceError
    from vllm_instant.tools.moe import expert_grouping, placement

    counts = _numbers("--devices", devices)
    try:
        trace = Trace.merge([Trace.read(path) for path in traces])
        with working("Learning clusters …"):
            found, evaluation = expert_grouping.learn(trace, clusters, seed)
        with working("Placing experts …"):
            first, second = trace.split(expert_grouping.TRAINING_FRACTION, seed)
            usable = [count for count in counts if count > 1]
            compared = [placement.compare(second, placement.place(first, c, seed), c, seed) for c in usable]
            placed = {count: placement.place(trace, count, seed) for count in usable}
    except TraceError as error:
        fail(str(error))
    notes = dict(found.learned_from) | {"placement": [comparison.to_record() for comparison in compared]}
    tables = {count: tuple(tuple(row) for row in table.tolist()) for count, table in placed.items()}
    replace(found, placement=tables, learned_from=notes).write(output)
    if eplb is not None:
        eplb.mkdir(parents=True, exist_ok=True)
        for count, table in placed.items():
            np.save(eplb / f"physical_to_logical_{count}.npy", placement.physical_to_logical(table))
    model = found.model
    print(f"{model.name}: {model.shape()}; {len(trace):,} tokens of {len(trace.requests)} requests")
    print(f"{found.clusters[0]} super-experts per layer: {evaluation.summary()}")
    if len(found.affinity) > 1:
        print(
            f"prompt classes ({', '.join(found.affinity)}) differ in {notes['class_distance']:.1%} "
            "of the router weight that clusters get"
        )
    _print_placement(compared)
    print(f"wrote {output}")


def _print_placement(compared: list[PlacementComparison]) -> None:
    rows = [
        (
            str(c.devices),
            f"{c.default.transfers.value:.2f}",
            f"{c.learned.transfers.value:.2f}",
            f"{c.saved.value:.1%} [{c.saved.low:.1%}, {c.saved.high:.1%}]",
            f"{c.default.imbalance:.2f}",
            f"{c.learned.imbalance:.2f}",
        )
        for c in compared
    ]
    headings = ("devices", "transfers, default", "placed", "saved [95 %]", "busiest / mean load, default", "placed")
    if rows:
        print("copies of a token's state that cross devices per layer, on held-out requests:")
        print_columns(headings, rows)


@app.command()
def report(
    model: Annotated[str, typer.Argument(help="Folder or Hugging Face name of the model, or `demo`.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Name of the result files, OUTPUT.json and OUTPUT.png.")
    ],
    text: Annotated[list[str] | None, typer.Option(help="Text to measure on: a file or folder, or CLASS=PATH.")] = None,
    clusters: Annotated[
        Path | None, typer.Option(help="File from `experts learn`, whose clusters are measured, too.")
    ] = None,
    batch: Annotated[str, typer.Option(help="Numbers of requests that decode together.")] = "16",
    budgets: Annotated[
        str | None, typer.Option(help="Numbers of experts per layer and step; seven from 7/8 to 1/8 of all by default.")
    ] = None,
    keep: Annotated[
        int, typer.Option(min=0, help="Number of top-ranked experts per token that the budget never drops.")
    ] = 1,
    windows: Annotated[int, typer.Option(min=1, help="Number of texts to measure on.")] = 64,
    context: Annotated[int, typer.Option(min=8, help="Number of tokens of a text.")] = 256,
    prompt: Annotated[int, typer.Option(min=0, help="Number of tokens of a text that count as its prompt.")] = 64,
) -> None:
    """Perplexity and KL divergence against the number of experts that a batch may share: table, JSON and plot.

    Runs the model itself on the CPU in float32, without a server.
    """
    packages = {"matplotlib": "Matplotlib", "torch": "PyTorch", "transformers": "Transformers"}
    require("experts report", packages, extra="experts,distill")
    from vllm_instant.moe.expert_groups import ClusterError, SuperExperts
    from vllm_instant.tools.distill.text import TextError
    from vllm_instant.tools.moe import plots
    from vllm_instant.tools.moe.offline import ModelError, OfflineModel
    from vllm_instant.tools.moe.quality_budget_curve import QualityBudgetCurve

    batches = _numbers("--batch", batch)
    largest = int(np.lcm.reduce(batches))
    if prompt > context - 4:
        fail(f"--prompt {prompt} leaves nothing of a --context of {context}: at most {context - 4}")
    if windows % largest:
        fail(f"--windows {windows} must be a multiple of --batch ({largest})")
    cluster = None
    try:
        learned = SuperExperts.read(clusters) if clusters is not None else None
        with working("Loading the model …"):
            folder = _folder(model)
            offline = OfflineModel(folder)
            asked = _windows(folder, model, text, windows, context).mixed()
        if learned is not None:
            learned.require(offline.routed, str(clusters))
            cluster = np.array(learned.cluster)
    except (ModelError, TextError, ClusterError) as error:
        fail(str(error))
    steps = _numbers("--budgets", budgets) if budgets else _steps(offline.routed.experts, offline.routed.top_k)
    settings = _settings(steps, keep, cluster)
    points: list[CurvePoint] = []
    with working("Native routing …") as status:
        windows_per_pass = largest * max(1, 32 // largest)
        curve = QualityBudgetCurve(offline, asked.tokens, prompt, cluster, windows_per_pass=windows_per_pass)
        for number, (size, setting) in enumerate([(size, setting) for size in batches for setting in settings], 1):
            status.update(f"{setting.form}, budget {setting.budget} ({number} of {len(settings) * len(batches)}) …")
            points.append(curve.measure(setting, size))
    record = {
        "model": model,
        "shape": offline.routed.shape(),
        "windows": windows,
        "context": context,
        "prompt": prompt,
        "perplexity": curve.perplexity,
        "points": [point.to_record() for point in points],
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    table, picture = output.with_suffix(".json"), output.with_suffix(".png")
    table.write_text(json.dumps(record, indent=2) + "\n")
    plots.draw(points, picture, f"{Path(model).name}: {offline.routed.shape()}")
    print(f"{model}: {offline.routed.shape()}; native perplexity {curve.perplexity:.2f}")
    print_points(points)
    print(f"wrote {table} and {picture}")


def print_points(points: list[CurvePoint]) -> None:
    """A table of points of a curve."""
    rows = [
        (
            str(p.batch),
            p.setting.form,
            str(p.setting.budget or "-"),
            str(p.setting.keep),
            f"{p.distinct.value:.1f}",
            f"{p.saved.value:.0%}",
            f"{p.perplexity.value:+.2%} [{p.perplexity.low:+.2%}, {p.perplexity.high:+.2%}]",
            f"{p.kl.value:.4f}",
            f"{p.mass:.3f}",
        )
        for p in points
    ]
    headings = ("batch", "form", "budget", "keep", "distinct", "fewer", "perplexity [95 %]", "KL, nats", "mass")
    print_columns(headings, rows)


def _settings(steps: list[int], keep: int, cluster: Any) -> list[Restriction]:
    from vllm_instant.tools.moe.quality_budget_curve import BUDGET, CLUSTER_PRIOR, HARD, NATIVE, OEA, Restriction

    found = [Restriction(NATIVE), *(Restriction(BUDGET, step, keep) for step in steps)]
    found.append(Restriction(OEA, 0, max(1, keep)))
    if cluster is not None:
        found += [Restriction(CLUSTER_PRIOR, step, keep, 1.0) for step in steps]
        found += [Restriction(HARD, count) for count in range(int(cluster.max()), 0, -1)]
    return found


def _steps(experts: int, top_k: int) -> list[int]:
    """Budgets from seven eighths of all experts down to one eighth, none below what a token chooses."""
    found = [round(experts * share / 8) for share in range(7, 0, -1)]
    return [step for step in dict.fromkeys(found) if step >= top_k]


def _folder(model: str) -> str:
    if model != DEMO:
        return model
    from vllm_instant.tools.demo import moe_assets, widen_experts

    # The same function as the served demo model at a fraction of its cost.
    with missing_models_reported():
        return str(moe_assets.prepare(size=widen_experts.SMALL, dtype="float32"))


def _windows(folder: str, model: str, text: list[str] | None, count: int, context: int) -> EvalWindows:
    from transformers import AutoTokenizer

    from vllm_instant.tools.distill.text import TextError, encode, read
    from vllm_instant.tools.moe.eval_windows import cut

    tokenizer = AutoTokenizer.from_pretrained(folder)
    if text:
        texts = [(c.name, c.training + c.held_out) for c in read(text)]
    elif model == DEMO:
        from vllm_instant.tools.demo.corpus import documents
        from vllm_instant.tools.demo.recipe import classes

        texts = [(c.name, c.held_out) for c in classes(list(documents()))]
    else:
        raise TextError("--text is needed: a file or folder with text like what the model serves")
    return cut([(name, encode(tokenizer, parts)) for name, parts in texts], count, context)


def _numbers(option: str, given: str) -> list[int]:
    try:
        found = [int(part) for part in given.split(",")]
    except ValueError:
        fail(f"{option} takes whole numbers with commas between them, found {given!r}")
    if min(found) < 1:
        fail(f"{option} takes numbers from 1, found {min(found)}")
    return found
