"""``vllm-instant try-drafter``: replays of texts."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from vllm_instant import Drafter, DraftRequest, Plugin, PluginOptions
from vllm_instant.deployment.plugin_manager import plugin_manager
from vllm_instant.tools.cli import app, try_drafter
from vllm_instant.tools.cli.drafter_replay import (
    NgramLookup,
    ReplayedRequest,
    TextError,
    read_requests,
    replay,
    word_tokenizer,
)


class Always(Drafter):
    """Proposes the same tokens in every step, and notes what it was asked."""

    def __init__(self, tokens):
        self.tokens = tokens
        self.asked = []
        self.forgotten = []

    def propose(self, requests):
        self.asked += [(r.request_id, len(r.token_ids), r.num_prompt_tokens, r.max_draft_tokens) for r in requests]
        return [self.tokens[: r.max_draft_tokens] for r in requests]

    def forget(self, request_id):
        self.forgotten.append(request_id)


def test_accepted_tokens_and_one_more_are_generated_per_step():
    # After [9] the answer is 1 2 3, 1 9, 1 2: its first token is sampled before the drafter is asked.
    request = ReplayedRequest([9], [0, 1, 2, 3, 1, 9, 1, 2])
    drafters = []

    def build():
        drafters.append(Always([1, 2]))
        return drafters[-1]

    found = replay(build, [request], 2, 10)
    assert [asked[1] for asked in drafters[-1].asked] == [2, 5, 7]
    assert found.steps == 3
    assert found.accepted_by_position == [3, 2]
    assert found.accepted_per_step == pytest.approx(5 / 3)
    assert found.drafted == 6
    assert found.generated == 8
    assert drafters[-1].forgotten == ["0"]


def test_a_draft_counts_up_to_its_first_wrong_token():
    found = replay(lambda: Always([5, 1, 2]), [ReplayedRequest([0], [0, 1, 1, 2])], 3, 10)
    assert found.accepted_by_position == [0, 0, 0]
    assert found.steps == 3


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ([1, 2, 3, 4, 1, 2], [3, 4, 1]),
        ([1, 2, 9, 1, 2, 8, 1, 2], [9, 1, 2]),  # the earliest
        ([7, 1, 2, 8, 1, 2, 3, 9, 7, 1, 2], [8, 1, 2]),  # the longest
        ([5, 5, 5], [5]),
        ([1, 2, 3], []),
        ([1], []),
        ([0x0201, 0x0403, 0x0302, 0x0201, 0x0403], [0x0302, 0x0201, 0x0403]),
    ],
)
def test_ngram_lookup(tokens, expected):
    request = DraftRequest("r", np.array(tokens, np.int32), 1, 3)
    assert NgramLookup(2, 4).propose([request]) == [expected]


@pytest.mark.engine
def test_ngram_lookup_is_that_of_vllm():
    ngram = pytest.importorskip("vllm.v1.spec_decode.ngram_proposer")
    rng = np.random.default_rng(0)
    for _ in range(300):
        tokens = rng.integers(0, 4, rng.integers(1, 40)).astype(np.int32)
        theirs = ngram._find_longest_matched_ngram_and_propose_tokens(tokens, 2, 4, 1000, 5).tolist()
        assert NgramLookup(2, 4).propose([DraftRequest("r", tokens, 1, 5)]) == [theirs]


def test_words_and_marks_are_tokens():
    encode = word_tokenizer()
    assert encode("to be, or not to be") == [0, 1, 2, 3, 4, 5, 1]
    assert encode("to\nbe") == [0, 6, 7]


class TestTexts:
    def test_plain_text_is_cut_into_requests(self, tmp_path):
        file = tmp_path / "text.txt"
        file.write_text("a " * 2049)
        first, second = read_requests(file, lambda text: [ord(c) for c in text][:2052])
        assert (len(first.prompt), len(first.answer)) == (512, 1536)
        assert (len(second.prompt), len(second.answer)) == (1, 3)

    def test_every_assistant_turn_of_a_chat_is_an_answer(self, tmp_path):
        file = tmp_path / "chat.jsonl"
        roles = ["system", "user", "assistant", "user", "assistant"]
        messages = [{"role": role, "content": f"text {number}"} for number, role in enumerate(roles)]
        file.write_text(json.dumps({"messages": messages}) + "\n\n" + json.dumps({"prompt": "p", "completion": "cc"}))
        texts = []
        read_requests(file, lambda text: texts.append(text) or [1, 2])
        beginning = "system: text 0\nuser: text 1\nassistant: "
        assert texts == [
            *(beginning, "text 2\n"),
            *(beginning + "text 2\nuser: text 3\nassistant: ", "text 4\n"),
            *("p", "cc"),
        ]

    @pytest.mark.parametrize(
        ("name", "text", "message"),
        [
            ("a.txt", "", "has no answer of two tokens or more"),
            ("a.jsonl", "{}", "line 1 should be"),
            ("a.jsonl", '{"prompt": "a", "completion": "b c"}\nno', "line 2 should be"),
            ("a.jsonl", '{"messages": [{"role": "user"}]}', "line 1 should be"),
            ("a.jsonl", '{"messages": [{"role": "user", "content": "x"}]}', "has no answer of two tokens or more"),
        ],
    )
    def test_files_that_cannot_be_replayed(self, tmp_path, name, text, message):
        (tmp_path / name).write_text(text)
        with pytest.raises(TextError, match=message):
            read_requests(tmp_path / name, word_tokenizer())

    def test_a_missing_file(self, tmp_path):
        with pytest.raises(TextError, match="cannot be read"):
            read_requests(tmp_path / "gone", word_tokenizer())


class Options(PluginOptions):
    token: int = 0


@pytest.fixture
def tried(tmp_path, monkeypatch):
    """Run the command for a drafter that always proposes the token of its option."""
    text = tmp_path / "text.txt"
    text.write_text("ha " * 400)
    plugin = Plugin(
        slot="drafter", name="always", summary="", options=Options, build=lambda o, context: Always([o.token] * 4)
    )
    find = plugin_manager().find

    def found(slot, name):
        return [type("Found", (), {"plugin": plugin})] if name == "always" else find(slot, name)

    monkeypatch.setattr(try_drafter.plugin_manager(), "find", found)
    monkeypatch.setenv("COLUMNS", "200")

    def run(*words):
        return CliRunner().invoke(app, ["try-drafter", "--text", str(text), *words])

    return run


def test_a_drafter_stands_beside_suffix_and_ngram(tried):
    result = tried("always", "--option", "token=1", "--draft-tokens", "3")
    assert result.exit_code == 0, result.output
    heading, *rows, note = [line.split() for line in result.output.splitlines()]
    assert heading == [
        *["accepted", "at", "position", "1", "2", "3", "drafted/step", "accepted/step", "tokens/step", "µs/step"]
    ]
    assert [row[0] for row in rows] == ["always", "suffix", "ngram"]
    assert rows[0][1:-1] == ["1.00", "1.00", "1.00", "3.00", "3.00", "4.00"]
    assert note[:5] == ["1", "requests,", "301", "tokens", "generated"]


def test_options_reach_the_drafter(tried):
    assert tried("always", "--option", "token=0").output.splitlines()[1].split()[1] == "0.00"


def test_a_drafter_of_the_comparison_is_listed_once(tried):
    rows = tried("ngram", "--option", "prompt_lookup_max=2").output.splitlines()
    assert [row.split()[0] for row in rows[1:3]] == ["ngram", "suffix"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nothing"], "drafter nothing is not installed; installed drafters: "),
        (["hybrid"], "drafter hybrid drafts with a model that vLLM runs"),
        (["native"], "drafter native drafts with a model that vLLM runs"),
        (["always", "--option", "token"], "--option token should be KEY=VALUE"),
        (["always", "--option", "tokens=3"], "option tokens of drafter always: Extra inputs"),
        (["always", "--option", "token=many"], "its options: token"),
        (["always", "--option", "token=-1"], "drafter always: token ids must lie in 0..2, found -1"),
        (["always", "--tokenizer", "/nowhere"], "--tokenizer /nowhere cannot be loaded"),
    ],
)
def test_what_cannot_be_tried_gets_one_sentence(tried, words, message):
    result = tried(*words)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
