"""From rounds to rows: how each metric is computed, and which rows are left out and why."""

import numpy as np
import pytest

from vllm_instant.tools.bench.checkpoint import BenchCheckpoint
from vllm_instant.tools.bench.metrics import acceptance_length, round_metrics
from vllm_instant.tools.bench.plan import (
    BASELINE,
    BASELINE_AGAIN,
    OURS,
    BadInputError,
    BenchPlan,
    HourlyPrice,
    read_prompts,
)
from vllm_instant.tools.bench.report import _without_home
from vllm_instant.tools.bench.rows import BenchRow, bench_rows, verdicts
from vllm_instant.tools.measure.closed_loop import PromptSpec
from vllm_instant.tools.measure.interleaved_rounds import ArmRound
from vllm_instant.tools.measure.token_stream import StreamedAnswer

PLAN = BenchPlan(concurrency=(2,), rounds=4, starts=1, texts=0, ttft_slo_ms=100, itl_slo_ms=15)


def _answer(first=0.1, gap=0.01, tokens=100, step=1, accepted=0, kind="code"):
    counts = [*list(range(1, tokens, step)), tokens]
    return StreamedAnswer(kind, [(first + i * gap, count) for i, count in enumerate(counts)], accepted)


def _arm_round(scale=1.0, joules=None, **given):
    return ArmRound(2.0 * scale, [_answer(0.1 * scale, 0.01 * scale, **given) for _ in range(8)], joules)


def _value(name, arm_round, plan=PLAN, price=None):
    metric = next(metric for metric in round_metrics(plan, price) if metric.name == name)
    return (metric.shown or metric.statistic)(metric.samples(arm_round))


class TestMetrics:
    def test_times(self):
        assert _value("TTFT p50", _arm_round()) == pytest.approx(100)
        assert _value("ITL p99", _arm_round()) == pytest.approx(10)
        assert _value("ITL p50", _arm_round(step=4)) == pytest.approx(2.5)
        assert _value("latency of a 100-token response", _arm_round()) == pytest.approx(100 + 99 * 10)

    def test_rates(self):
        assert _value("output tokens/s", _arm_round()) == 400
        # 2 s of 3.60 an hour are 0.002, for 800 tokens.
        assert _value("cost per million output tokens", _arm_round(), price=HourlyPrice(3.6, "EUR")) == pytest.approx(
            2.5
        )
        assert _value("energy per token", _arm_round(joules=40.0)) == 0.05

    @pytest.mark.parametrize(("given", "good"), [({}, 8), ({"first": 0.2}, 0), ({"gap": 0.02}, 0)])
    def test_goodput_counts_answers_within_both_goals(self, given, good):
        arm_round = ArmRound(2.0, [_answer(**given) for _ in range(8)])
        assert _value("goodput (TTFT ≤ 100 ms, ITL ≤ 15 ms)", arm_round) == good / 2

    def test_no_goals_no_goodput_and_no_price_no_cost(self):
        names = [metric.name for metric in round_metrics(BenchPlan(), None)]
        assert not any("goodput" in name or "cost" in name for name in names)

    def test_acceptance_length_by_class(self):
        arm_round = ArmRound(1.0, [_answer(accepted=50), _answer(accepted=0, kind="free")])
        assert acceptance_length("code").statistic(acceptance_length("code").samples(arm_round)) == 2
        assert acceptance_length("free").statistic(acceptance_length("free").samples(arm_round)) == 1
        unknown = ArmRound(1.0, [_answer(accepted=None)])
        assert acceptance_length("code").samples(unknown) is None


def _state(tmp_path, plan, arms, served=None):
    state = BenchCheckpoint(tmp_path / "x.state.jsonl", plan.setup(), list(arms))
    for number in range(plan.rounds):
        state.add_round((number, 2), {arm: make(number) for arm, make in arms.items()})
    facts = {"speculates": False, "kv_bytes_per_token": 64.0, "kv_sequences": 10.0, "url": "u", "root": "r"}
    state.add_served({arm: facts | (served or {}).get(arm, {}) for arm in arms})
    return state


def _noisy(scale, seed):
    def make(number):
        return _arm_round(scale * (1 + 0.01 * np.random.default_rng([seed, number]).normal()))

    return make


class TestRows:
    def test_a_faster_arm_is_better_everywhere(self, tmp_path):
        state = _state(tmp_path, PLAN, {BASELINE: _noisy(1, 1), BASELINE_AGAIN: _noisy(1, 2), OURS: _noisy(0.5, 3)})
        found = {row.name: row for row in bench_rows(PLAN, state, None, None)}
        for name in ("TTFT p50", "ITL p99", "latency of a 100-token response", "output tokens/s"):
            assert found[name].contrasts[OURS].verdict == "better", name
            assert (
                found[name].values[BASELINE].low < found[name].values[BASELINE].mean < found[name].values[BASELINE].high
            )
        assert found["output tokens/s"].contrasts[OURS].effect.mean == pytest.approx(2, rel=0.05)
        assert found["TTFT p99"].missing == "32 samples; 100 are needed"
        assert found["energy per token"].missing == "no energy counter of NVML or RAPL is readable on this machine"
        assert found["acceptance length, code"].contrasts[OURS].verdict == "same"
        assert found["KV-cache bytes per token"].contrasts[OURS].verdict == "same"
        assert found["goodput (TTFT ≤ 100 ms, ITL ≤ 15 ms)"].values[OURS].mean == pytest.approx(8, rel=0.05)

    def test_equal_arms_are_neither_better_nor_worse(self, tmp_path):
        state = _state(tmp_path, PLAN, {BASELINE: _noisy(1, 1), BASELINE_AGAIN: _noisy(1, 2), OURS: _noisy(1, 3)})
        counts = verdicts(bench_rows(PLAN, state, None, None))
        assert counts["better"] == counts["worse"] == 0
        assert counts["same"] + counts["undecided"] > 8

    def test_a_slower_cache_that_holds_less_is_worse(self, tmp_path):
        served = {OURS: {"kv_bytes_per_token": 80.0, "kv_sequences": 8.0}}
        state = _state(
            tmp_path, PLAN, {BASELINE: _noisy(1, 1), BASELINE_AGAIN: _noisy(1, 2), OURS: _noisy(1.5, 3)}, served
        )
        found = {row.name: row for row in bench_rows(PLAN, state, None, None)}
        for name in ("KV-cache bytes per token", "concurrent sequences of full length", "output tokens/s"):
            assert found[name].contrasts[OURS].verdict == "worse"

    def test_two_rates_of_zero_are_not_compared(self, tmp_path):
        state = _state(tmp_path, PLAN, {BASELINE: _noisy(2, 1), BASELINE_AGAIN: _noisy(2, 2), OURS: _noisy(1.9, 3)})
        goodput = next(row for row in bench_rows(PLAN, state, None, None) if row.name.startswith("goodput"))
        assert goodput.contrasts == {}

    def test_a_server_that_does_not_report_accepted_drafts(self, tmp_path):
        def silent(number):
            return ArmRound(2.0, [_answer(accepted=None)])

        arms = {BASELINE: silent, BASELINE_AGAIN: silent, OURS: silent}
        state = _state(tmp_path, PLAN, arms, {OURS: {"speculates": True}})
        row = next(row for row in bench_rows(PLAN, state, None, None) if row.group == "speculation")
        assert "--per-request-spec-decode-metrics summary" in row.missing

    def test_answers_of_the_deep_end_have_rows_where_requests_are_escalated(self, tmp_path):
        def escalating(number):
            fast, deep = _answer(first=0.1), _answer(first=0.5)
            fast.answered_by, deep.answered_by = "fast", "deep"
            return ArmRound.read(ArmRound(2.0, [fast, fast, fast, deep]).plain())

        arms = {BASELINE: _noisy(1, 1), BASELINE_AGAIN: _noisy(1, 2), OURS: escalating}
        found = {row.name: row for row in bench_rows(PLAN, _state(tmp_path, PLAN, arms), None, None)}
        assert found["answers of the deep end"].values[OURS].mean == 0.25
        assert found["TTFT p50, deep end"].values[OURS].mean == pytest.approx(500)
        assert found["TTFT p50, fast end"].values[OURS].mean == pytest.approx(100)
        arms[OURS] = _noisy(1, 3)
        (tmp_path / "other").mkdir()
        found = bench_rows(PLAN, _state(tmp_path / "other", PLAN, arms), None, None)
        assert not [row for row in found if row.group == "escalation"]

    def test_a_row_survives_json(self, tmp_path):
        state = _state(tmp_path, PLAN, {BASELINE: _noisy(1, 1), BASELINE_AGAIN: _noisy(1, 2), OURS: _noisy(0.5, 3)})
        for row in bench_rows(PLAN, state, None, None):
            assert BenchRow.read(row.plain()) == row


class TestQuality:
    @staticmethod
    def _rows(tmp_path, ours):
        state = _state(tmp_path, PLAN, {BASELINE: _noisy(1, 1), BASELINE_AGAIN: _noisy(1, 2), OURS: _noisy(1, 3)})
        equal = {"same": [1.0] * 24, "losses": [[100.0, 100.0, 0.0, 50]] * 16, "gaps": [0.01, -0.01] * 12}
        state.add_quality({BASELINE_AGAIN: equal, OURS: equal | ours})
        return {
            row.name: row.contrasts[OURS].verdict
            for row in bench_rows(PLAN, state, None, None)
            if row.group == "quality"
        }

    def test_equal_servers(self, tmp_path):
        assert set(self._rows(tmp_path, {}).values()) == {"same"}

    @pytest.mark.parametrize(
        ("name", "ours"),
        [
            ("greedy answers equal to vLLM's", {"same": [1.0, 0.0] * 12}),
            ("perplexity divided by vLLM's", {"losses": [[100.0, 110.0, 0.0, 50]] * 16}),
            ("KL divergence from vLLM", {"losses": [[100.0, 100.0, 5.0, 50]] * 16}),
            ("vLLM's log-probability of sampled answers, minus that of its own", {"gaps": [-0.5, -0.4] * 12}),
            ("vLLM's log-probability of sampled answers, minus that of its own", {"gaps": [0.5, 0.4] * 12}),
        ],
    )
    def test_each_kind_of_quality_loss_has_its_row(self, tmp_path, name, ours):
        found = self._rows(tmp_path, ours)
        assert [row for row, verdict in found.items() if verdict == "worse"] == [name]


class TestPlan:
    def test_each_start_has_equally_many_rounds(self):
        plan = BenchPlan(rounds=7, starts=3)
        assert [plan.rounds_of(start) for start in range(3)] == [[0, 1, 2], [3, 4], [5, 6]]

    def test_stages_double_the_rounds_up_to_the_limit(self):
        plan = BenchPlan(rounds=4, starts=2, max_rounds=12)
        assert plan.stage_ends == [4, 8, 12]
        assert [plan.rounds_of(start, 2) for start in range(2)] == [[8, 9], [10, 11]]
        assert BenchPlan(rounds=4).stage_ends == [4]

    def test_built_in_prompts_are_fresh_every_round(self):
        plan = BenchPlan(concurrency=(1, 8))
        asked = [p.text for number in range(-1, 6) for users in (1, 8) for p in plan.prompts_of(number, users)]
        asked += [p.text for p in plan.prompts_of(0, 8, attempt=1)]
        assert len(set(asked)) > 0.97 * len(asked)  # short pieces of text can be alike

    def test_all_of_the_users_prompts_are_sent_before_any_is_repeated(self):
        prompts = tuple(PromptSpec(f"{i}") for i in range(84))
        plan = BenchPlan(concurrency=(1, 8), rounds=6, prompts=prompts)
        asked = [p.text for number in range(-1, 6) for users in (1, 8) for p in plan.prompts_of(number, users)]
        assert sorted(asked) == sorted(p.text for p in prompts)
        assert plan.repeats() == 1

    @pytest.mark.parametrize(
        ("text", "price"),
        [("2.50USD", HourlyPrice(2.5, "USD")), ("3 eur", HourlyPrice(3, "EUR")), ("1$", HourlyPrice(1, "$"))],
    )
    def test_prices(self, text, price):
        assert HourlyPrice.parse(text) == price

    @pytest.mark.parametrize("text", ["2.50", "USD", "0USD", "-1USD", "two USD", "2.50 per hour"])
    def test_no_prices(self, text):
        with pytest.raises(BadInputError, match="is not a price with its currency"):
            HourlyPrice.parse(text)

    def test_prompt_files(self, tmp_path):
        lines = tmp_path / "prompts.txt"
        lines.write_text("one\n\ntwo\n")
        assert [p.text for p in read_prompts(lines)] == ["one", "two"]
        objects = tmp_path / "prompts.jsonl"
        objects.write_text('{"prompt": "a\\nb", "class": "chat", "temperature": 0.7}\n{"prompt": "c"}\n')
        assert read_prompts(objects) == (PromptSpec("a\nb", 0.7, "chat"), PromptSpec("c", 0.0, "prompts"))
        objects.write_text('{"text": "c"}\n')
        with pytest.raises(BadInputError, match="object 1 should be like"):
            read_prompts(objects)


class TestState:
    def test_it_resumes_where_it_stopped(self, tmp_path):
        arms = {BASELINE: _noisy(1, 1), BASELINE_AGAIN: _noisy(1, 2), OURS: _noisy(1, 3)}
        first = _state(tmp_path, PLAN, arms)
        with first.path.open("a") as file:
            file.write('{"place": [3, ')  # killed while it wrote
        second = BenchCheckpoint(first.path, PLAN.setup(), list(arms))
        plain = [
            {p: {arm: t.plain() for arm, t in r.items()} for p, r in s.arm_rounds.items()} for s in (first, second)
        ]
        assert plain[0] == plain[1]
        assert len(plain[1]) == PLAN.rounds
        assert second.salt == first.salt
        assert second.attempt == 1
        second.add_quality({"x": 1})
        third = BenchCheckpoint(first.path, PLAN.setup(), list(arms))
        assert third.quality == {"x": 1}
        assert third.attempt == 2

    def test_another_setup_is_refused_by_name(self, tmp_path):
        BenchCheckpoint(tmp_path / "s", PLAN.setup(), [])
        with pytest.raises(BadInputError, match=r"an unfinished run with another concurrency \(\[2\], now \[4\]\)"):
            BenchCheckpoint(tmp_path / "s", BenchPlan(concurrency=(4,), rounds=4, starts=1, texts=0).setup(), [])


@pytest.mark.parametrize(
    ("home", "text", "shown"),
    [
        ("/home/ann", "/home/ann/models and '/home/ann'", "~/models and '~'"),
        ("/home/ann", "--config=/home/ann/deploy.toml", "--config=~/deploy.toml"),
        ("/home/ann", "/home/annabel/models /srv/home/ann/x", "/home/annabel/models /srv/home/ann/x"),
        ("/", "tokens/s at http://127.0.0.1:8000/v1", "tokens/s at http://127.0.0.1:8000/v1"),
    ],
)
def test_only_the_home_folder_itself_is_hidden_in_results(monkeypatch, home, text, shown):
    monkeypatch.setenv("HOME", home)
    assert _without_home({"paths": [text], "number": 1}) == {"paths": [shown], "number": 1}
