"""The page: what is drawn where."""

import re

import pytest

from vllm_instant.tools.bench import html_report
from vllm_instant.tools.bench.html_report import RatioAxis, render
from vllm_instant.tools.bench.rows import BenchRow
from vllm_instant.tools.html.plots import LinePlot, PlotBand, PlotLine
from vllm_instant.tools.measure.significance import Contrast
from vllm_instant.tools.measure.statistics import Estimate


def _row(name, ratio, verdict_is, better="higher"):
    effect = Estimate(ratio, ratio / 1.02, ratio * 1.02)
    contrast = Contrast("ratio", better, effect, effect, Estimate(1.0, 0.98, 1.02), 1.05)
    assert contrast.verdict == verdict_is
    values = {"vLLM": Estimate(10.0, 9.9, 10.1), "ours": Estimate(10 * ratio, 1.0, 99.0)}
    return BenchRow("concurrency 1", name, "tokens/s", values, {"ours": contrast})


def _record(*rows):
    served = {"root": "models/x", "url": "http://x", "version": "", "max_model_len": None, "deployment": "[drafter]<&>"}
    return {
        "model": "<x>",
        "device": "two cores",
        "versions": {"vllm": "1"},
        "date": "2026-01-01",
        "command": "vllm-instant bench x",
        "margin": 0.05,
        "notes": ["a note"],
        "setup": {"rounds": 2, "starts": 1, "tokens": 100},
        "arms": {"vLLM": served, "vLLM again": served, "ours": served},
        "rows": [row.plain() for row in rows],
        "tokens_per_second_by_round": {"1": {"vLLM": [9, 10], "vLLM again": [10, 9], "ours": [20, 21]}},
        "itl_ms_quantiles": {"1": {"vLLM": [[0.1, 5], [0.9, 9]], "vLLM again": [], "ours": [[0.1, 2], [0.9, 9]]}},
    }


def test_every_row_verdict_and_plot_is_there():
    rows = [
        _row("speed", 2.0, "better"),
        _row("TTFT", 1.5, "worse", "lower"),
        _row("ITL", 1.01, "same"),
        _row("E2E", 1.04, "undecided"),
    ]
    page = render(_record(*rows, BenchRow("energy", "energy per token", "J", missing="no counter")))
    for word in ("▲ better", "▼ worse", "= same", "? undecided", "– not measured", "▲ 1 better", "a note"):
        assert word in page
    assert len(re.findall("<figure>", page)) == 2
    assert "prefers-color-scheme: dark" in page
    assert 'name="viewport"' in page


def test_it_is_self_contained_and_escapes_what_it_is_given():
    page = render(_record(_row("speed", 2.0, "better")))
    assert "&lt;x&gt;: vllm-instant" in page
    assert "[drafter]&lt;&amp;&gt;" in page
    assert not re.search(r"<(script|link|img|iframe)|url\((?!#)|@import", page)


def test_the_axis_has_one_in_the_middle_and_is_the_same_both_ways():
    axis = RatioAxis([_row("speed", 3.0, "better")])
    assert axis.place(1.0) == 50
    assert axis.place(2.0) + axis.place(0.5) == pytest.approx(100)
    assert 50 < axis.place(2.0) < axis.place(3.0) < 100
    assert axis.place(1e-300) == 0
    assert axis.place(1e9) == 100
    labels = [tick.label for tick in axis.ticks()]
    assert "1×" in labels
    assert "3×" in labels
    assert [tick.at for tick in axis.ticks()] == sorted(tick.at for tick in axis.ticks())


def test_an_interval_that_reaches_zero_can_be_drawn():
    row = _row("speed", 2.0, "better")
    contrast = row.contrasts["ours"]
    nearly = Contrast("ratio", "higher", Estimate(2.0, 0.0, 9e9), contrast.certain, contrast.floor, 1.05)
    assert RatioAxis([BenchRow("g", "n", "u", {}, {"ours": nearly})]).place(0.0) == 0


def test_without_matplotlib_the_page_has_its_tables(monkeypatch):
    monkeypatch.setattr(html_report, "plots_available", lambda: False)
    page = render(_record(_row("speed", 2.0, "better")))
    assert "▲ better" in page
    assert "<svg" not in page


def test_bands_and_titles_are_escaped():
    band = PlotBand(1, 2, "spike", "more <&> than before", "1")
    drawn = LinePlot('"p99" <ITL>', "seconds", [PlotLine("a", [0, 3], [1, float("nan")])], [band]).svg()
    assert "<title>more &lt;&amp;&gt; than before</title>" in drawn
    assert 'aria-label="&quot;p99&quot; &lt;ITL&gt;"' in drawn
    assert 'id="band' not in drawn
