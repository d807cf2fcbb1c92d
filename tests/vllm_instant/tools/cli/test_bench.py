"""`vllm-instant bench` against servers that make up their answers."""

import json
import re

import pytest
from fake_server import FakeServer, serving
from typer.testing import CliRunner

from vllm_instant.tools.bench import session
from vllm_instant.tools.cli import app
from vllm_instant.tools.cli import bench as bench_command
from vllm_instant.tools.measure import interleaved_rounds
from vllm_instant.tools.measure.sampling import RefusedError

QUICK = ["--concurrency", "2", "--rounds", "4", "--tokens", "20"]
UNREACHABLE = "http://127.0.0.1:9"


@pytest.fixture(autouse=True)
def _calm(monkeypatch):
    """These servers need no second to become idle."""
    monkeypatch.setattr(interleaved_rounds, "settle", lambda: None)


@pytest.fixture
def bench(tmp_path):
    def run(ours, *words, baseline=None, again=None, quick=QUICK):
        with (
            serving(baseline or FakeServer()) as baseline_url,
            serving(again or FakeServer()) as again_url,
            serving(ours) as our_url,
        ):
            urls = ["--baseline", baseline_url, "--baseline-again", again_url, "--ours", our_url]
            result = CliRunner().invoke(
                app, ["bench", *urls, *quick, "--output", str(tmp_path / "result"), *words], terminal_width=250
            )
        file = tmp_path / "result.json"
        return result, json.loads(file.read_text()) if file.exists() else None

    return run


def _verdicts(record, arm="ours"):
    return {
        f"{row['group']}: {row['name']}": row["contrasts"][arm]["verdict"]
        for row in record["rows"]
        if arm in row["contrasts"]
    }


def test_a_faster_server_is_better_and_everything_is_saved(bench, tmp_path):
    slow = {"step_seconds": 0.006}
    ours = FakeServer(drafts=4, step_tokens=4, **slow)
    goals = ["--ttft-slo-ms", "1000", "--itl-slo-ms", "1000", "--price-per-hour", "2.50USD"]
    result, record = bench(ours, *goals, baseline=FakeServer(**slow), again=FakeServer(**slow))
    assert result.exit_code == 0, result.output
    verdicts = _verdicts(record)
    # The median does not mind a busy machine; the others need only be there.
    assert verdicts["concurrency 2: ITL p50"] == "better"
    for name in ("output tokens/s", "cost per million output tokens", "goodput (TTFT ≤ 1000 ms, ITL ≤ 1000 ms)"):
        assert verdicts[f"concurrency 2: {name}"] in ("better", "same", "undecided")
    assert verdicts["speculation: acceptance length, math-like"] == "better"
    assert verdicts["quality: perplexity divided by vLLM's"] == "same"
    assert "worse" not in verdicts.values()
    missing = {row["name"]: row["missing"] for row in record["rows"] if row["missing"]}
    assert missing["latency of a 100-token response"] == "answers are shorter than 100 tokens (--tokens)"
    assert record["arms"]["vLLM"]["version"] == "9.9"
    assert re.search(r"ITL p50 .* better", result.output)
    page = (tmp_path / "result.html").read_text()
    assert page.count("<svg") == 2
    assert "▲ better" in page
    assert not re.search(r'(src|href)="(?!#)', page)  # nothing is fetched
    assert not (tmp_path / "result.state.jsonl").exists()


def test_three_equal_servers_are_neither_better_nor_worse(bench):
    result, record = bench(FakeServer())
    assert result.exit_code == 0, result.output
    assert set(_verdicts(record).values()) <= {"same", "undecided"}


def test_a_lossy_server_is_worse_in_quality(bench):
    result, record = bench(FakeServer(bias=-0.3), "--short", quick=[*QUICK, "--margin", "1"])
    assert result.exit_code == 0, result.output
    verdicts = _verdicts(record)
    assert verdicts["quality: perplexity divided by vLLM's"] == "worse"
    assert verdicts["quality: KL divergence from vLLM"] == "worse"


def test_an_output_that_cannot_be_written_is_reported_before_measuring(bench):
    with serving(FakeServer()) as stock, serving(FakeServer()) as ours:
        result = CliRunner().invoke(
            app, ["bench", "--stock", stock, "--ours", ours, *QUICK, "--no-quality", "--output", "/dev/null/x"]
        )
    assert result.exit_code == 2
    assert "/dev/null/x.state.jsonl cannot be written" in result.output


def test_one_more_arm_and_one_baseline_server(tmp_path):
    file = tmp_path / "r"
    with serving(FakeServer()) as stock, serving(FakeServer()) as ours, serving(FakeServer(kv_tokens=500)) as small:
        words = ["--stock", stock, "--ours", ours, "--arm", f"small={small}", *QUICK, "--no-quality"]
        result = CliRunner().invoke(app, ["bench", *words, "--output", str(file)])
    assert result.exit_code == 0, result.output
    record = json.loads(file.with_suffix(".json").read_text())
    assert _verdicts(record, "small")["KV cache: concurrent sequences of full length"] == "worse"
    assert _verdicts(record)["KV cache: concurrent sequences of full length"] == "same"
    assert "measured twice" in record["notes"][0]
    assert not any(row["group"] == "quality" for row in record["rows"])


class TestInterrupted:
    @pytest.fixture
    def taken(self, monkeypatch):
        """Nine arm rounds, the last of which fails: three warm-ups, one complete round of three, one incomplete."""
        made = []
        run_arm_round = session.run_arm_round

        def failing(*arguments, **given):
            made.append(given["concurrency"])
            if len(made) == 9:
                raise RefusedError("the server has gone")
            return run_arm_round(*arguments, **given)

        monkeypatch.setattr(session, "run_arm_round", failing)
        return made

    def test_it_is_resumed(self, bench, taken):
        with serving(FakeServer()) as url:
            urls = ["--stock", url, "--stock-again", url, "--ours", url]
            result, _ = bench(FakeServer(), *urls, "--no-quality")
            assert result.exit_code == 2
            assert "the server has gone" in result.output
            result, record = bench(FakeServer(), *urls, "--no-quality")
        assert result.exit_code == 0, result.output
        assert len(taken) == 9 + 3 + 3 * 3
        assert "The run was interrupted and resumed once." in record["notes"]

    def test_a_changed_setup_is_refused_unless_it_starts_afresh(self, bench, taken):
        with serving(FakeServer()) as url:
            urls = ["--stock", url, "--stock-again", url, "--ours", url]
            bench(FakeServer(), *urls)
            result, _ = bench(FakeServer(), *urls, "--rounds", "3")
            assert result.exit_code == 2
            assert "is an unfinished run with another rounds (4, now 3): give --fresh" in result.output
            result, record = bench(FakeServer(), *urls, "--rounds", "3", "--fresh", "--no-quality")
        assert result.exit_code == 0, result.output
        assert record["setup"]["rounds"] == 3


class TestCompare:
    @pytest.fixture
    def records(self, bench, tmp_path):
        kept = []
        for name, tokens in (("a", 5), ("b", 1)):
            servers = [FakeServer(step_seconds=0.006, step_tokens=n) for n in (1, 1, tokens)]
            _, record = bench(servers[2], "--no-quality", baseline=servers[0], again=servers[1])
            kept.append(tmp_path / f"{name}.json")
            kept[-1].write_text(json.dumps(record))
        return kept

    def test_a_regression_is_found_and_an_improvement_is_not_one(self, records):
        before, after = map(str, records)
        result = CliRunner().invoke(app, ["bench", "--compare", before, after])
        assert result.exit_code == 1, result.output
        assert re.search(r"ITL p50 .*worse", result.output)
        result = CliRunner().invoke(app, ["bench", "--compare", after, before])
        assert result.exit_code == 0, result.output
        assert re.search(r"ITL p50 .*better", result.output)
        result = CliRunner().invoke(app, ["bench", "--compare", before, before])
        assert result.exit_code == 0
        assert "better" not in result.output

    def test_records_that_cannot_be_compared(self, records, tmp_path):
        other = tmp_path / "other.json"
        other.write_text(json.dumps(json.loads(records[0].read_text()) | {"model": "another"}))
        result = CliRunner().invoke(app, ["bench", "--compare", str(records[0]), str(other)])
        assert result.exit_code == 2
        assert result.output == "vllm-instant: the results have different models: fake and another\n"
        other.write_text("{}")
        for file, message in ((other, "is not a result of `vllm-instant bench`"), (tmp_path / "no", "cannot be read")):
            result = CliRunner().invoke(app, ["bench", "--compare", str(records[0]), str(file)])
            assert result.exit_code == 2
            assert message in result.output
            assert result.output.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give a MODEL to start, or --baseline and --ours"),
        (["--stock", UNREACHABLE], "--baseline and --ours belong together"),
        (["model", "--stock", UNREACHABLE, "--ours", UNREACHABLE], "model: running servers take no MODEL"),
        (["--stock", UNREACHABLE, "--ours", UNREACHABLE], f"{UNREACHABLE} is no running vLLM server"),
        (
            ["--stock", UNREACHABLE, "--ours", UNREACHABLE, "--starts", "2"],
            "--starts is for servers that are started here",
        ),
        (
            ["--stock", UNREACHABLE, "--ours", UNREACHABLE, "--max-model-len", "8"],
            "--max-model-len 8: running servers take no MODEL and no words for it",
        ),
        (["model", "--price-per-hour", "2.50"], "--price-per-hour 2.50 is not a price with its currency: write"),
        (["model", "--prompts", "nowhere.txt"], "--prompts nowhere.txt cannot be read"),
        (["model", "--concurrency", "1,many"], "--concurrency 1,many should be numbers of users above 0"),
        (["model", "--concurrency", "0"], "--concurrency 0 should be numbers of users above 0"),
        (["model", "--arm", "ours=x.toml"], "--arm ours=x.toml should be NAME=FILE with a name of its own"),
        (["model", "--max-rounds", "8"], "--max-rounds limits --until-decided and does nothing without it"),
        (
            ["model", "--until-decided", "--max-rounds", "6"],
            "--max-rounds 6 leaves no further rounds after the first 6",
        ),
        (["model", "--starts", "4", "--rounds", "3"], "--starts 4 needs at least as many --rounds, not 3"),
        (["model", "--instant-config", "nowhere.toml"], "nowhere.toml"),
        (["model", "--arm", "other=nowhere.toml"], "nowhere.toml"),
    ],
)
def test_bad_input_gets_one_sentence(words, message, tmp_path):
    result = CliRunner().invoke(app, ["bench", "--output", str(tmp_path / "x"), *words])
    assert result.exit_code == 2
    assert message in result.stderr
    assert len([line for line in result.stderr.splitlines() if line.startswith("vllm-instant: ")]) == 1


def test_an_empty_prompt_file(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("\n\n")
    result = CliRunner().invoke(app, ["bench", "model", "--prompts", str(file)])
    assert result.exit_code == 2
    assert result.output == f"vllm-instant: --prompts {file} has no prompts: write one per line\n"


def test_different_models(bench, tmp_path):
    result, record = bench(FakeServer(root="/models/other"))
    assert result.exit_code == 2
    assert re.search(
        r"the servers have different models: \S+ serves models/fake, \S+ serves /models/other", result.output
    )
    assert record is None
    assert not list(tmp_path.iterdir())  # nothing was measured that could be continued


def test_rounds_are_added_until_every_row_is_decided(bench, monkeypatch):
    """The first four rounds leave a row undecided; the next four decide it, so that the limit of 16 is not reached."""
    needed = iter([5, None])
    monkeypatch.setattr(bench_command, "rounds_to_decide", lambda rows: next(needed))
    result, record = bench(FakeServer(), "--until-decided", "--no-quality")
    assert result.exit_code == 0, result.output
    assert "undecided after 4 rounds, about 5 more would decide" in result.stderr
    assert record["setup"]["rounds"] == 8
    assert len(record["tokens_per_second_by_round"]["2"]["ours"]) == 8


def test_added_rounds_end_at_the_limit(bench, monkeypatch):
    monkeypatch.setattr(bench_command, "rounds_to_decide", lambda rows: 99)
    result, record = bench(FakeServer(), "--until-decided", "--max-rounds", "6", "--no-quality")
    assert result.exit_code == 0, result.output
    assert record["setup"]["rounds"] == 6
