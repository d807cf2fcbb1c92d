"""Objectives against autograd, windows, shapes, text, acceptance, and a whole run on a tiny pair."""

import copy
import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from vllm_instant.tools.cli import app
from vllm_instant.tools.demo import assets
from vllm_instant.tools.distill import architecture, distill, losses, text
from vllm_instant.tools.distill.acceptance import measure
from vllm_instant.tools.distill.initialization import layers_of, spread, start_at_target
from vllm_instant.tools.distill.losses import CACHED_FLOATS, CHUNK, head_distance
from vllm_instant.tools.distill.teacher import TaughtWindows, Teacher
from vllm_instant.tools.distill.training import Training, overridden


def _tiny(seed=0, **changes):
    torch.manual_seed(seed)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    shape |= {"num_key_value_heads": 1, "vocab_size": 80, "max_position_embeddings": 256, "tie_word_embeddings": True}
    return LlamaForCausalLM(LlamaConfig(**shape | changes)).eval()


class TestObjectives:
    @pytest.mark.parametrize("which", ["kl", "tv"])
    @pytest.mark.parametrize("cached", [CACHED_FLOATS, 30 * 100])
    def test_value_and_gradients_are_those_of_autograd(self, which, cached, monkeypatch):
        monkeypatch.setattr(losses, "CACHED_FLOATS", cached)
        torch.manual_seed(0)
        tokens, width, vocabulary = CHUNK + 37, 12, 30
        hidden = torch.randn(tokens, width, requires_grad=True)
        head = torch.randn(vocabulary, width, requires_grad=True)
        target = torch.randn(tokens, vocabulary).softmax(-1)
        value = head_distance(hidden, head, target.log(), lambda states: states, which)
        value.backward()
        found = hidden.grad.clone(), head.grad.clone()
        hidden.grad = head.grad = None
        logits = hidden @ head.T
        if which == "kl":
            expected = torch.nn.functional.kl_div(logits.log_softmax(-1), target, reduction="batchmean")
        else:
            expected = 0.5 * (logits.softmax(-1) - target).abs().sum(-1).mean()
        expected.backward()
        assert value.item() == pytest.approx(expected.item(), rel=1e-4)
        torch.testing.assert_close(found[0], hidden.grad, rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(found[1], head.grad, rtol=1e-3, atol=1e-6)

    @pytest.mark.parametrize("which", ["kl", "tv"])
    def test_equal_distributions_are_at_distance_zero(self, which):
        hidden, head = torch.randn(9, 4), torch.randn(7, 4)
        same = hidden @ head.T
        assert head_distance(hidden, head, same, lambda states: states, which).item() == pytest.approx(0, abs=1e-5)

    def test_the_order_of_objectives(self):
        assert [distill.objective_at("kl-tv", p) for p in (0.0, 0.49, 0.5, 1.0)] == ["kl", "kl", "tv", "tv"]
        assert distill.objective_at("tv", 0.1) == "tv"


class TestTeacher:
    def test_states_give_the_model_s_own_distribution(self):
        model = _tiny()
        tokens = torch.randint(0, 80, (2, 9))
        teacher = Teacher(model)
        states = teacher.states(tokens)
        assert states.shape == (2, 9, 64)
        torch.testing.assert_close(teacher.logits(states), model(input_ids=tokens).logits)

    def test_scaled_or_capped_logits_are_noticed(self):
        model = _tiny()
        plain = model.forward

        def scaled(*args, **kwargs):
            output = plain(*args, **kwargs)
            output.logits = output.logits * 0.25
            return output

        model.forward = scaled
        tokens = torch.randint(0, 80, (1, 5))
        with torch.no_grad():
            # An untrained head gives small logits; make the scaling visible.
            model.get_output_embeddings().weight.mul_(50)
        teacher = Teacher(model)
        states = teacher.states(tokens)
        assert states.shape == (1, 5, 80)
        torch.testing.assert_close(teacher.logits(states), model(input_ids=tokens).logits)

    def test_windows_repeat_exactly_and_the_teacher_runs_once_per_window(self):
        teacher = Teacher(_tiny())
        stream = torch.randint(0, 80, (500,))
        asked = []
        original = teacher.states
        teacher.states = lambda tokens: asked.append(len(tokens)) or original(tokens)
        first, second = (TaughtWindows(stream, teacher, 6, 16, seed=3) for _ in range(2))
        batches = [first.batch(step, 4) for step in range(20)]
        assert sum(asked) == 6
        for step, (tokens, states) in enumerate(batches):
            again_tokens, again_states = second.batch(step, 4)
            assert torch.equal(tokens, again_tokens)
            torch.testing.assert_close(states, again_states)
        asked.clear()
        forgetful = TaughtWindows(stream, teacher, 6, 16, seed=3, memory=0)
        torch.testing.assert_close(forgetful.batch(5, 4)[1], batches[5][1])
        forgetful.batch(5, 4)
        assert sum(asked) == 8


class TestArchitecture:
    def test_the_demo_draft_has_the_derived_shape(self):
        from vllm_instant.tools.demo import recipe

        shape = architecture.derive(recipe.BASE.config(), architecture.parameters(recipe.BASE.config()))
        assert {key: getattr(shape, key) for key in vars(recipe.DRAFT)} == vars(recipe.DRAFT)

    @pytest.mark.parametrize("share", [0.05, 0.1, 0.3])
    def test_it_is_the_widest_that_fits(self, share):
        target = _tiny(hidden_size=512, intermediate_size=1024, num_hidden_layers=9, num_attention_heads=8).config
        total = architecture.parameters(target)
        shape = architecture.derive(target, total, share)
        assert architecture.parameters(shape) <= share * total
        wider = architecture.shaped(target, shape.num_hidden_layers, shape.hidden_size + 32)
        assert architecture.parameters(wider) > share * total
        assert shape.num_hidden_layers == 3
        assert shape.vocab_size == target.vocab_size
        assert shape.num_attention_heads % shape.num_key_value_heads == 0

    def test_a_vocabulary_that_is_too_large_is_refused(self):
        target = _tiny(vocab_size=50_000).config
        with pytest.raises(ValueError, match=r"vocabulary of 50000 tokens.*--share"):
            architecture.derive(target, architecture.parameters(target), 0.1)


class TestText:
    def test_folders_files_and_json_lines(self, tmp_path):
        (tmp_path / "code").mkdir()
        (tmp_path / "code/a.py").write_text("x = 1\n" * 3000)
        (tmp_path / "code/b.bin").write_text("not text")
        (tmp_path / "chat.jsonl").write_text('{"prompt": "Hi", "response": "Ho"}\n\n{"other": 1}\n')
        (tmp_path / "kept.txt").write_text("kept")
        code, chat = text.read(
            [str(tmp_path / "code"), f"talk={tmp_path / 'chat.jsonl'}"], [f"talk={tmp_path / 'kept.txt'}"]
        )
        assert (code.name, chat.name) == ("code", "talk")
        pieces = code.training + code.held_out
        assert "".join(sorted(pieces)) == "x = 1\n" * 3000
        assert all(len(piece) <= text.PIECE_CHARACTERS + 10 for piece in pieces)
        assert chat.training == ["Hi\nHo", '{"other": 1}']
        assert chat.held_out == ["kept"]

    def test_some_of_many_documents_are_held_out_by_name(self):
        texts = text.TextClass("a")
        for number in range(2400):
            texts.add(str(number), "x")
        assert 60 < len(texts.held_out) < 150

    @pytest.mark.parametrize(
        ("source", "message"),
        [("nowhere", "does not exist"), ("empty", "no text found"), ("bad.jsonl", r"bad.jsonl, line 2: not JSON")],
    )
    def test_unreadable_text_is_refused(self, tmp_path, source, message):
        (tmp_path / "empty").mkdir()
        (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"text"\n')
        with pytest.raises(text.TextError, match=message):
            text.read([str(tmp_path / source)])

    def test_too_little_text_is_refused(self):
        tokenizer = _demo_tokenizer()
        texts = text.TextClass("short", ["hello"])
        with pytest.raises(text.TextError, match=r"too few: at least 512"):
            text.tokenized(tokenizer, [texts], 64)


def _demo_tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(assets.ASSETS / "base")


class TestAcceptance:
    def test_a_model_accepts_itself(self):
        model = _tiny()
        stream = torch.randint(0, 80, (400,))
        for temperature in (0.0, 1.0):
            found = measure(model, model, stream, "self", temperature, positions=4, places=20, context=16)
            assert found.by_position == pytest.approx([1.0] * 4)
            assert found.mean_length == pytest.approx(4.0)
            assert found.places == 20

    @pytest.mark.parametrize("temperature", [0.0, 1.0])
    def test_a_cache_of_the_draft_changes_nothing(self, temperature):
        """The draft model without its cache reads all tokens again for each proposal."""
        target = _tiny(0, tie_word_embeddings=False)
        draft = copy.deepcopy(target)
        with torch.no_grad():
            for model in (target, draft):
                model.lm_head.weight.mul_(8)  # sharp distributions: another token would be noticed
            draft.lm_head.weight.add_(0.1 * torch.randn_like(draft.lm_head.weight))
        stream = torch.randint(0, 80, (400,))

        def forgetful(input_ids, **options):
            output = draft(input_ids=input_ids, **options)
            output.past_key_values = None
            return output

        forgetful.device = torch.device("cpu")
        shape = {"positions": 5, "places": 60, "context": 16}
        found = measure(target, draft, stream, "x", temperature, **shape)
        assert found == measure(target, forgetful, stream, "x", temperature, **shape)
        assert 0 < found.mean_length < 5

    def test_the_first_position_is_the_overlap_of_the_distributions(self):
        """Two models with fixed, different distributions: acceptance is the sum of minima (Leviathan et al.)."""
        p, q = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.2, 0.6])

        def model(distribution):
            def answer(input_ids, **options):
                return SimpleOutput(distribution.log().expand(*input_ids.shape, 3))

            answer.device = torch.device("cpu")
            return answer

        class SimpleOutput:
            def __init__(self, logits):
                self.logits = logits

        stream = torch.zeros(9000, dtype=torch.int64)
        found = measure(model(p), model(q), stream, "x", 1.0, positions=2, places=4000, context=8, batch=500)
        assert found.by_position == pytest.approx([0.6, 0.6], abs=0.03)
        greedy = measure(model(p), model(q), stream, "x", 0.0, positions=2, places=10, context=8)
        assert greedy.by_position[0] == 0
        assert greedy.mean_length == 0


def test_plans_keep_the_share_of_the_decay():
    plan = Training(seed=0, steps=100, decay_steps=50, matrix_rate=1, other_rate=1)
    changed = overridden(plan, steps=10, batch=None, context=7)
    assert (changed.steps, changed.decay_steps, changed.batch, changed.context) == (10, 5, plan.batch, 7)


class TestCommand:
    @pytest.fixture(scope="class")
    def material(self, tmp_path_factory):
        """A tiny target with the demo's tokenizer, trained on nothing, and a text file."""
        folder = tmp_path_factory.mktemp("distill")
        tokenizer = _demo_tokenizer()
        target = _tiny(vocab_size=4096, hidden_size=256, num_hidden_layers=3, num_attention_heads=4)
        target.save_pretrained(folder / "target")
        tokenizer.save_pretrained(folder / "target")
        (folder / "words.txt").write_text("a red fox and a lazy dog\n" * 1500)
        return folder

    def _run(self, *words):
        return CliRunner().invoke(app, ["distill", *map(str, words), "--device", "cpu"])

    def _words(self, material, output):
        return [material / "target", output, "--text", f"fox={material / 'words.txt'}", "--steps", 30, "--context", 32]

    def test_it_trains_saves_and_reports(self, material, tmp_path):
        result = self._run(*self._words(material, tmp_path / "draft"), "--share", "0.25")
        assert result.exit_code == 0, result.output
        report = json.loads((tmp_path / "draft" / distill.REPORT).read_text())
        assert report["draft_parameters"] <= 0.25 * report["target_parameters"]
        assert {(row["text"], row["temperature"]) for row in report["acceptance"]} == {("fox", 0.0), ("fox", 1.0)}
        loaded = LlamaForCausalLM.from_pretrained(tmp_path / "draft")
        assert loaded.num_parameters() == report["draft_parameters"]
        assert "num_speculative_tokens" in result.output
        # Run again, it is done: nothing is trained twice.
        again = self._run(*self._words(material, tmp_path / "draft"), "--share", "0.25")
        assert again.exit_code == 0
        other = self._run(*self._words(material, tmp_path / "draft"), "--share", "0.3")
        assert other.exit_code == 2
        assert "another shape" in other.output

    def test_it_trains_a_draft_with_layers_of_the_target(self, material, tmp_path):
        words = [*self._words(material, tmp_path / "draft"), "--take-layers", 1]
        result = self._run(*words, "--share", 0.9)
        assert result.exit_code == 0, result.output
        report = json.loads((tmp_path / "draft" / distill.REPORT).read_text())
        assert report["layers_of_target"] == 1
        assert report["training"]["matrix_rate"] == distill.TRAINING_OF_LAYERS.matrix_rate
        loaded = LlamaForCausalLM.from_pretrained(tmp_path / "draft")
        assert (loaded.config.num_hidden_layers, loaded.config.hidden_size) == (1, 256)
        target = LlamaForCausalLM.from_pretrained(material / "target")
        started, now = (m.get_input_embeddings().weight.float() for m in (target, loaded))
        likeness = torch.nn.functional.cosine_similarity(started, now).mean()
        assert likeness > 0.7, "30 steps do not make other embeddings"
        too_large = self._run(*self._words(material, tmp_path / "other"), "--take-layers", 2)
        assert too_large.exit_code == 2
        assert "2 of the target's layers has at least" in too_large.output

    def test_without_text_the_target_writes(self, material, tmp_path):
        words = ["--generate", 20, "--steps", 2, "--context", 16, "--share", "0.25"]
        result = self._run(material / "target", tmp_path / "draft", *words)
        assert result.exit_code == 0, result.output
        rows = json.loads((tmp_path / "draft" / distill.REPORT).read_text())["acceptance"]
        assert {row["text"] for row in rows} == {"generated"}

    def test_it_learns_from_answers_to_prompts_by_class(self, material, tmp_path):
        prompts = tmp_path / "prompts.jsonl"
        entries = [{"prompt": f"a red fox {i}", "class": name} for i in range(24) for name in ("fox", "dog")]
        prompts.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
        words = ["--prompts", prompts, "--answer-tokens", 24, "--steps", 2, "--context", 16, "--share", "0.25"]
        result = self._run(material / "target", tmp_path / "draft", *words)
        assert result.exit_code == 0, result.output
        rows = json.loads((tmp_path / "draft" / distill.REPORT).read_text())["acceptance"]
        assert {row["text"] for row in rows} == {"fox", "dog"}

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (["--prompts", "/nowhere/at/all"], "/nowhere/at/all does not exist"),
            (["--objective", "l2"], "--objective must be one of kl, tv, kl-tv"),
            (["--text", "/nowhere/at/all"], "/nowhere/at/all does not exist"),
            (["--share", "0.001"], "allow that with --share"),
            (["--take-layers", "3"], "the target has 3 layers: a draft must have fewer than that, found 3"),
            (["--take-layers", "1", "--layers", "1"], "--layers is the depth of a new model"),
        ],
    )
    def test_bad_input_is_one_sentence(self, material, tmp_path, change, message):
        result = self._run(*self._words(material, tmp_path / "draft"), *change)
        assert result.exit_code == 2
        assert message in result.output
        assert "Traceback" not in result.output

    @pytest.mark.parametrize("damage", ["missing", "corrupt"])
    def test_a_target_that_cannot_be_loaded_is_refused(self, material, tmp_path, damage):
        target = tmp_path / "target"
        if damage == "corrupt":
            import shutil

            shutil.copytree(material / "target", target)
            (target / "model.safetensors").write_bytes(b"\x07" * 100)
        result = self._run(target, tmp_path / "draft", "--text", material / "words.txt")
        assert result.exit_code == 2
        assert "cannot be loaded" in result.output
        assert result.output.count("\n") <= 2


def test_resumed_training_equals_an_uninterrupted_run(tmp_path):
    target = _tiny(1)
    plan = Training(1, 240, 50, 0.02, 3e-3, batch=2, context=16, warmup_steps=5)
    tokens = [text.TokenClass("a", torch.randint(0, 80, (900,)), torch.randint(0, 80, (90,)))]

    def run(folder, stops=None):
        folder.mkdir(exist_ok=True)

        def progress(step, steps, loss):
            if step == stops:
                raise KeyboardInterrupt

        draft = _tiny(2, hidden_size=32, intermediate_size=64, num_hidden_layers=1)
        distill.distill(target, draft, tokens, folder, plan=plan, progress=progress)
        return draft

    whole = run(tmp_path / "whole").state_dict()
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "halves", stops=230)
    for name, value in run(tmp_path / "halves").state_dict().items():
        torch.testing.assert_close(whole[name], value, rtol=1e-3, atol=1e-4)


def test_distilling_brings_the_draft_closer(tmp_path):
    target = _tiny(1)
    with torch.no_grad():
        target.get_output_embeddings().weight.mul_(8)  # sharp distributions: there is something to learn
    stream = torch.randint(0, 80, (3000,))
    tokens = [text.TokenClass("a", stream[:2500], stream[2500:])]
    draft = _tiny(2, hidden_size=32, intermediate_size=64, num_hidden_layers=1)
    before = measure(target, draft, tokens[0].held_out, "a", 1.0, 1, 100, 16).mean_length
    plan = Training(1, 150, 50, 0.02, 1e-2, batch=8, context=32, warmup_steps=5)
    distill.distill(target, draft, tokens, tmp_path, plan=plan)
    after = measure(target, draft, tokens[0].held_out, "a", 1.0, 1, 100, 16).mean_length
    assert after > before + 0.1


def test_embeddings_start_in_the_principal_directions_of_the_target():
    """They span the strongest directions of the target's outputs."""
    target, draft = _tiny(1, tie_word_embeddings=False), _tiny(2, hidden_size=32)
    with torch.no_grad():
        target.model.norm.weight.copy_(torch.linspace(0.1, 2.0, 64))
    start_at_target(draft, target)
    head = target.lm_head.weight * target.model.norm.weight
    strongest = torch.linalg.svd(head, full_matrices=False).U[:, :32]
    started = draft.get_input_embeddings().weight
    assert torch.allclose(strongest @ (strongest.T @ started), started, atol=1e-5)
    assert started.std().item() == pytest.approx(0.02, rel=1e-3)


def test_a_draft_as_wide_as_its_target_starts_as_it_is():
    draft = _tiny(2)
    before = draft.get_input_embeddings().weight.clone()
    start_at_target(draft, _tiny(1))
    assert torch.equal(draft.get_input_embeddings().weight, before)


class TestLayersOfTheTarget:
    @pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gpt_neox", "gpt2"])
    def test_it_is_the_target_without_its_other_layers(self, name):
        """What the target computes without its middle layer, the draft computes."""
        import transformers

        torch.manual_seed(0)
        shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 2}
        shape |= {"vocab_size": 80, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 1}
        if name not in ("gpt_neox", "gpt2"):
            shape |= {"num_key_value_heads": 1, "head_dim": 32}
        config = transformers.AutoConfig.for_model(name, **shape)
        target = transformers.AutoModelForCausalLM.from_config(config).eval()
        draft = layers_of(target, 2).eval()
        assert draft.config.num_hidden_layers == 2
        assert draft.num_parameters() < target.num_parameters()
        layers = target.base_model.h if name == "gpt2" else target.base_model.layers
        del layers[1]
        target.config.num_hidden_layers = 2
        tokens = torch.randint(2, 80, (2, 9))
        with torch.inference_mode():
            found, expected = (m(input_ids=tokens, use_cache=False).logits for m in (draft, target))
        torch.testing.assert_close(found, expected)

    def test_they_are_spread_from_the_first_to_the_last(self):
        assert [spread(n, 6) for n in (1, 2, 3, 5)] == [[0], [0, 5], [0, 2, 5], [0, 1, 2, 4, 5]]
        assert spread(4, 32) == [0, 10, 21, 31]

    def test_a_draft_must_be_smaller(self):
        with pytest.raises(ValueError, match="has 2 layers: a draft must have fewer than that, found 2"):
            layers_of(_tiny(), 2)

    def test_layers_that_are_not_found_are_refused(self):
        target = _tiny()
        target.state_dict = lambda: {"model.blocks.0.weight": torch.zeros(3)}
        with pytest.raises(ValueError, match="the layers of LlamaForCausalLM cannot be taken one by one"):
            layers_of(target, 1)
