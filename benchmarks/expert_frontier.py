"""What the demo's mixture of experts loses when a batch shares fewer experts, by the form of the restriction.

python benchmarks/expert_frontier.py [--windows 96]

Without a server: held-out text, decoded side by side as in a server (vllm_instant/tools/moe/offline.py), every setting
on the same windows as native routing. Clusters are learned from training text. Writes results/expert_frontier.json and
docs/expert_frontier.svg.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import results
import torch
from transformers import AutoTokenizer

from vllm_instant.moe.routing_trace import Trace
from vllm_instant.tools.demo import moe_assets, widen_experts
from vllm_instant.tools.demo.corpus import documents
from vllm_instant.tools.demo.recipe import classes
from vllm_instant.tools.distill.text import encode
from vllm_instant.tools.moe import expert_grouping, placement, plots
from vllm_instant.tools.moe.eval_windows import EvalWindows, cut
from vllm_instant.tools.moe.offline import OfflineModel
from vllm_instant.tools.moe.quality_budget_curve import (
    BUDGET,
    CLUSTER_PRIOR,
    EXPERT_PRIOR,
    HARD,
    NATIVE,
    OEA,
    CurvePoint,
    QualityBudgetCurve,
    Restriction,
)

CONTEXT, PROMPT = 256, 64
BATCHES = (8, 16, 32)
BUDGETS = (48, 40, 36, 32, 28, 24, 20, 16)
HARD_CLUSTERS = 8
TRACED = 192
DEVICES = (2, 4, 8)
DOCUMENTS, PARTS = 6, 16
COMPANY_BUDGET = 32
RESULT = results.HERE / "results/expert_frontier.json"


def main() -> None:
    """Learn, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--windows", type=int, default=96)
    parser.add_argument("--redraw", action="store_true", help="only draw what was measured before")
    arguments = parser.parse_args()
    if arguments.redraw:
        measured = json.loads(RESULT.read_text())["runs"][-1]["measured"]
        draw([CurvePoint.from_record(point) for point in measured["points"]], measured["model"])
        return
    folder = moe_assets.prepare(size=widen_experts.SMALL, dtype="float32")
    model = OfflineModel(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = classes(list(documents()))
    training = cut([(c.name, encode(tokenizer, c.training)) for c in texts], TRACED, CONTEXT).mixed()
    held_out = cut([(c.name, encode(tokenizer, c.held_out)) for c in texts], arguments.windows, CONTEXT).mixed()
    trace = model.trace(training.tokens, training.classes, PROMPT)
    other = model.trace(held_out.tokens, held_out.classes, PROMPT)

    learned, evaluation = expert_grouping.learn(trace)
    print(evaluation.summary(), flush=True)
    pairs = expert_grouping.co_activation(trace)
    cluster = expert_grouping.clusters_of(pairs, HARD_CLUSTERS)
    curve = QualityBudgetCurve(model, held_out.tokens, PROMPT, cluster, expert_grouping.strength(trace))
    points = [curve.measure(Restriction(NATIVE), batch) for batch in (1, *BATCHES)]
    for batch in BATCHES:
        for setting in settings(batch):
            points.append(curve.measure(setting, batch))
            show = points[-1]
            print(batch, setting, show.saved, show.perplexity, show.kl, f"{show.mass:.3f}", flush=True)
    draw(points, model.routed.shape())
    results.write(
        RESULT,
        {
            "model": model.routed.shape(),
            "windows": arguments.windows,
            "context": CONTEXT,
            "prompt": PROMPT,
            "perplexity": round(curve.perplexity, 4),
            "learned": dict(learned.learned_from),
            "hard_clusters": HARD_CLUSTERS,
            "judged_clusters": judged_clusters(trace, other, cluster),
            "placement": [
                placement.compare(other, placement.place(trace, count), count).to_record() for count in DEVICES
            ],
            "points": [point.to_record() for point in points],
            "company": company(model, held_out, tokenizer),
        },
    )


def draw(points: list[CurvePoint], shape: str) -> None:
    """The forms that differ, at one strength each."""
    drawn = [
        point
        for point in points
        if point.setting.form != EXPERT_PRIOR
        and point.setting.cohesion <= 1
        and (point.setting.form != BUDGET or point.setting.keep == 1)
    ]
    picture = Path(__file__).resolve().parent.parent / "docs" / "expert_frontier.svg"
    plots.draw(drawn, picture, f"demo mixture of experts: {shape}")
    print(f"wrote {picture}")


def settings(batch: int) -> list[Restriction]:
    """The forms at every budget; variants of the budget at batch 16 only."""
    found = [Restriction(BUDGET, budget, 1) for budget in BUDGETS]
    found += [Restriction(CLUSTER_PRIOR, budget, 1, 1.0) for budget in BUDGETS[1::2]]
    found += [Restriction(OEA, 0, keep) for keep in (1, 2, 3, 4)]
    found += [Restriction(HARD, count) for count in (7, 6, 5, 4, 3)]
    if batch == 16:
        found += [Restriction(BUDGET, budget, keep) for keep in (0, 2) for budget in BUDGETS[1::2]]
        found += [Restriction(CLUSTER_PRIOR, budget, 1, 4.0) for budget in BUDGETS[1::2]]
        found += [Restriction(EXPERT_PRIOR, budget, 1) for budget in BUDGETS[1::2]]
    return found


def judged_clusters(trace: Trace, other: Trace, cluster: np.ndarray) -> dict[str, object]:
    """What the clusters of the hard form are worth on held-out text."""
    found = expert_grouping.evaluate(other, cluster, expert_grouping.stability(trace, HARD_CLUSTERS))
    return found.to_record()


def company(model: OfflineModel, held_out: EvalWindows, tokenizer: object) -> list[dict[str, object]]:
    """Related requests side by side, or unrelated ones: distinct experts, and the perplexity at one budget."""
    long = [(f"{d.kind}/{d.name}", encode(tokenizer, [d.text])) for d in documents() if d.held_out]
    long = [(name, stream) for name, stream in long if len(stream) >= PARTS * CONTEXT][:DOCUMENTS]
    parts = cut(long, PARTS * len(long), CONTEXT)
    cells: list[dict[str, object]] = []
    arms = (
        ("kinds of text mixed", held_out.mixed()),
        ("one kind of text in a batch", held_out.grouped()),
        ("documents mixed", parts.mixed()),
        ("parts of one document in a batch", parts.grouped()),
    )
    for name, windows in arms:
        curve = QualityBudgetCurve(model, windows.tokens, PROMPT, windows_per_pass=PARTS)
        for setting in (Restriction(NATIVE), Restriction(BUDGET, COMPANY_BUDGET, 1)):
            cells.append({"company": name} | curve.measure(setting, PARTS).to_record())
            print(name, cells[-1]["distinct"], cells[-1]["perplexity"], flush=True)
    return cells


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
