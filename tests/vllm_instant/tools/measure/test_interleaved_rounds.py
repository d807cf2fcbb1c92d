"""Rounds of fixed work, energy counters, prompts, and what servers report about themselves."""

import random

import numpy as np
import pytest
from fake_server import FakeServer, serving

from vllm_instant.tools.measure import interleaved_rounds
from vllm_instant.tools.measure.closed_loop import PromptSpec
from vllm_instant.tools.measure.energy import energy_meter
from vllm_instant.tools.measure.interleaved_rounds import ArmRound, interleaved, run_arm_round
from vllm_instant.tools.measure.prompts import BUILT_IN, built_in, held_out_texts
from vllm_instant.tools.measure.sampling import RefusedError
from vllm_instant.tools.measure.server_info import read_server_info
from vllm_instant.tools.measure.servers import words_of
from vllm_instant.tools.measure.token_stream import StreamedAnswer


class TestAnswers:
    ANSWER = StreamedAnswer("code", [(0.1, 1), (0.3, 5), (0.4, 6)], accepted=3)

    def test_tokens_that_arrive_together_share_the_time(self):
        assert self.ANSWER.inter_token_latencies() == pytest.approx([0.05] * 4 + [0.1])

    def test_times_to_tokens(self):
        assert self.ANSWER.ttft == 0.1
        assert self.ANSWER.seconds_to(2) == self.ANSWER.seconds_to(5) == 0.3
        assert np.isnan(self.ANSWER.seconds_to(7))

    def test_a_round_survives_json(self):
        arm_round = ArmRound(0.5, [self.ANSWER], joules=2.0)
        assert ArmRound.read(arm_round.plain()) == arm_round
        assert arm_round.tokens == 6


class TestRounds:
    def test_every_round_has_all_arms_in_random_order(self, monkeypatch):
        settled = []
        monkeypatch.setattr(interleaved_rounds, "settle", lambda: settled.append(1))
        taken = list(interleaved(["a", "b", "c"], range(8), random.Random(1)))
        assert len(settled) == 24
        orders = {tuple(arm for number, arm in taken if number == asked) for asked in range(8)}
        assert all(sorted(order) == ["a", "b", "c"] for order in orders)
        assert len(orders) > 1

    def test_all_prompts_are_answered_to_the_end(self):
        server = FakeServer(step_tokens=3, drafts=1)
        joules = iter([5.0, 7.5])
        with serving(server) as url:
            prompts = [PromptSpec(f"p{i}", 0.5, "even" if i % 2 == 0 else "odd") for i in range(5)]
            arm_round = run_arm_round(
                read_server_info(url).arm(), prompts, concurrency=2, tokens=10, seed=40, energy=lambda: next(joules)
            )
        assert [answer.kind for answer in arm_round.answers] == ["even", "odd", "even", "odd", "even"]
        assert {answer.tokens for answer in arm_round.answers} == {10}
        assert {answer.accepted for answer in arm_round.answers} == {6}
        assert arm_round.joules == 2.5
        assert sorted(request["seed"] for request in server.requests) == [40, 41, 42, 43, 44]
        assert all(0 < answer.ttft < arm_round.seconds for answer in arm_round.answers)

    def test_a_refusal_is_quoted(self):
        server = FakeServer()
        with serving(server) as url:
            arm = read_server_info(url).arm()
            server.status = 500
            with pytest.raises(
                RefusedError, match="did not answer a request as it should: HTTP 500: the engine is dead"
            ):
                run_arm_round(arm, [PromptSpec("p")], concurrency=1, tokens=2)


class TestPrompts:
    def test_classes_alternate_and_another_seed_gives_others(self):
        prompts = built_in(10, "a")
        assert [prompt.kind for prompt in prompts[:4]] == list(BUILT_IN)
        assert len({prompt.text for prompt in prompts} & {prompt.text for prompt in built_in(10, "b")}) == 0
        assert prompts == built_in(10, "a")

    def test_held_out_texts_are_as_long_as_asked(self):
        texts = held_out_texts(3, characters=500)
        assert len(texts) == 3
        assert all(400 < len(text) <= 500 for text in texts)


class TestEnergy:
    @pytest.fixture
    def domain(self, tmp_path):
        folder = tmp_path / "intel-rapl:0"
        folder.mkdir()
        (folder / "max_energy_range_uj").write_text("10000000")
        (folder / "energy_uj").write_text("9000000")
        (tmp_path / "intel-rapl:0:0").mkdir()  # a part of it, already counted
        return folder

    def test_joules_add_up_over_the_end_of_the_counter(self, domain, tmp_path):
        counted = energy_meter(tmp_path)
        before = counted.joules()
        (domain / "energy_uj").write_text("9500000")
        assert counted.joules() - before == pytest.approx(0.5)
        (domain / "energy_uj").write_text("200000")
        assert counted.joules() - before == pytest.approx(1.2)

    def test_no_counter_or_one_that_may_not_be_read(self, tmp_path):
        assert energy_meter(tmp_path).joules() is None
        (tmp_path / "intel-rapl:0").mkdir()
        assert energy_meter(tmp_path).joules() is None


class TestServerInfo:
    def test_it_reports_model_version_and_kv_cache(self):
        with serving(FakeServer(drafts=4)) as url:
            served = read_server_info(f"{url}/v1/")
        assert (served.url, served.name, served.root, served.model) == (url, "fake", "models/fake", "fake")
        assert (served.version, served.kv_bytes_per_token, served.kv_sequences) == ("9.9", 64.0, 10.0)
        assert served.speculates

    def test_a_server_without_these_metrics(self):
        with serving(FakeServer(kv_tokens=None)) as url:
            served = read_server_info(url)
        assert served.kv_bytes_per_token is None
        assert served.kv_sequences is None
        assert not served.speculates

    @pytest.mark.parametrize("url", ["http://127.0.0.1:9", "nonsense", "http://"])
    def test_no_server(self, url):
        with pytest.raises(RefusedError, match="is no running vLLM server"):
            read_server_info(url)


def test_engine_arguments_become_words():
    table = {"max_model_len": 8, "enforce_eager": True, "enable_prefix_caching": False, "a": {"b": 1}, "c": [1, 2]}
    assert words_of(table) == [
        *("--max-model-len", "8", "--enforce-eager", "--no-enable-prefix-caching", "--a", '{"b": 1}', "--c", "1", "2")
    ]


def test_lists_become_words_as_vllm_takes_them():
    table = {"allowed_origins": ["a"], "middleware": ["b", "c"], "lora_modules": [{"name": "d"}], "api_key": []}
    assert words_of(table) == [
        *("--allowed-origins", '["a"]', "--middleware", "b", "--middleware", "c", "--lora-modules", '{"name": "d"}')
    ]
