"""The tables of lossy samplers beside each other, and of the escalation."""

from __future__ import annotations

from collections.abc import Sequence

from result_tables import Run, Show, cells_of, interval, table


def samplers_cascade(runs: Sequence[Run]) -> str:
    """Accepted tokens and quality of the lossy samplers by bound; speed where it was measured."""
    speeds = {(cell["sampler"], cell["bound"]): cell for cell in cells_of(runs, "served")}
    rows = []
    for cell in cells_of(runs, "frontier"):
        served = speeds.get((cell["sampler"], cell["bound"]))
        gains = [cell[f"more_at_equal_{quality}"] for quality in ("perplexity", "divergence")]
        shown = [f"{gain['mean']:+.2f} [{gain['low']:+.2f}, {gain['high']:+.2f}]" for gain in gains]
        rows.append(
            [
                cell["text"],
                cell["sampler"],
                f"{cell['bound']:g}",
                f"{cell['accepted']:.2f}",
                f"{cell['perplexity']:.2f}",
                f"{cell['divergence']:.4f}",
                f"{cell['variation']:.3f}, {cell['highest_variation']:.3f}",
                *(shown if "cascade" in cell["sampler"] else ["–", "–"]),
                "–" if served is None else interval(served["tokens_per_second"], 1),
            ]
        )
    headings = ["text", "sampler", "bound", "accepted of 8", "perplexity", "KL, nats", "variation: mean, highest"]
    beyond = [f"accepted beyond `relaxed` at equal {quality}" for quality in ("perplexity", "KL")]
    return table([*headings, *beyond, "tokens/s"], rows)


def escalation_decisions(runs: Sequence[Run]) -> str:
    """Microseconds that a decision adds."""
    rows = [
        [f"`{cell['plugin']}`", f"{cell['characters']:,}", interval(cell["microseconds"], 0)]
        for cell in cells_of(runs, "decisions")
    ]
    for cell in cells_of(runs, "label"):
        first, step = cell["first_token_ms"], interval(cell["step_ms"], 1)
        case = f"first token {interval(first['fast'], 1)} → {interval(first['auto'], 1)} ms, a decoding step {step} ms"
        case += f", blocks of {cell['block_size']} tokens"
        rows.append(["`label`", case, f"{1e3 * cell['added_ms']:,.0f}"])
    return table(["plugin", "characters of the prompt; case", "added until the first part, µs"], rows)


def escalation_routing(runs: Sequence[Run]) -> str:
    """The learned rule beside its baselines on held-out prompts."""
    rows = []
    for cell in cells_of(runs, "routing"):
        for name, found in cell["classes"].items():
            case = f"{name}, {found['prompts']} prompts"
            rows.append([case, f"fast {found['fast_score']:.3f}, deep {found['deep_score']:.3f}", ""])
        rows.append(["always fast", interval(cell["fast"], 3), f"{cell['fast_cost']:.3f} s"])
        rows.append(["always deep", interval(cell["deep"], 3), f"{cell['deep_cost']:.3f} s"])
        share = f"learned rule, {100 * cell['share']:.0f} % deep"
        rows.append([share, interval(cell["rule"], 3), f"{cell['rule_cost']:.3f} s"])
        rows.append(["the rule less a random mix at equal cost", interval(cell["over_random_mix"], 3), ""])
        rows.append(["the rule less the prompt's length at equal cost", interval(cell["over_length"], 3), ""])
        rows.append(["always deep less the rule", interval(cell["loss"], 3), ""])
        rows.append(["recommended", "; ".join(cell["reasons"]) or "yes", ""])
    return table(["policy", "mean score", "mean cost"], rows)


TABLES: dict[str, tuple[str, Show]] = {
    "samplers_cascade": ("samplers", samplers_cascade),
    "escalation_decisions": ("escalation", escalation_decisions),
    "escalation_routing": ("escalation", escalation_routing),
}
