"""A mixture of experts from SmolLM2: a branch of the model per kind of text, whose feed-forward layers become experts.

"Branch-train-mix" (Sukhbaatar et al. 2024) with kinds of text that are found by clustering (c-BTM, Gururangan et al.
2023): text is clustered by its words; for each cluster a copy of the model is trained briefly, its feed-forward layers
alone; the copies' feed-forward layers become the experts of one Mixtral model, which shares everything else. The router
is the linear map that best predicts from a layer's input which cluster a token belongs to.

Text: the standard library (code, records of its functions, docstrings) and conversations of ``prompt_sets`` in the
model's chat template. Nothing of HumanEval and no JSON task is among it: these measure the model later.
"""

from __future__ import annotations

import ast
import json
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from vllm_instant.tools.demo import prompt_sets, real_model, upcycling
from vllm_instant.tools.demo.corpus import documents

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, MixtralForCausalLM

PIECE_CHARACTERS = 1600
FOLDER = "moe"
Report = Callable[[str, int, int, float], None]
"""(name, step, steps, loss)."""


@dataclass(frozen=True)
class MixPlan:
    """The shape of the mixture, and how its branches are trained; ``batch`` windows of ``context`` tokens per step."""

    experts: int = 8
    chosen: int = 2
    steps: int = 4
    batch: int = 1
    context: int = 256
    rate: float = 5e-4
    seed: int = 0
    pieces: int = 600
    """Maximum number of pieces of each kind of text."""


PLAN = MixPlan()


def run(output: Path, report: Report, plan: MixPlan = PLAN, base_folder: Path | None = None) -> dict[str, Any]:
    """Make the mixture under ``output/moe``; returns what its ``recipe.json`` then holds.

    A run that was interrupted keeps the branches that it has trained.

    Args:
        output: folder to write to.
        report: called after each training step.
        plan: shape and training.
        base_folder: a Llama model with its tokenizer; SmolLM2 by default.

    """
    import transformers

    source = base_folder or real_model.prepare()
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    work = output / "work"
    work.mkdir(parents=True, exist_ok=True)
    text = _clustered(tokenizer, plan, work)
    for number, stream in enumerate(text["training"]):
        _branch(source, stream, plan, number, work, report)
    base = transformers.LlamaForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    windows = [_windows(stream, plan.context, 8, plan.seed) for stream in text["training"]]
    mixture = mix(base, [work / f"branch{number}.pt" for number in range(plan.experts)], windows, plan)
    folder = output / FOLDER
    card = {
        "plan": asdict(plan) | {"parameters": mixture.num_parameters()},
        "pieces": text["pieces"],
        "words": text["words"],
        "held_out": evaluate(base, mixture, text["held_out"], plan.context),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    mixture.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "recipe.json").write_text(json.dumps(card, indent=1) + "\n")
    shutil.rmtree(work)
    return card


def _clustered(tokenizer: Any, plan: MixPlan, work: Path) -> dict[str, Any]:
    """Token streams of each cluster, to train on and held out, with what the card says of them; kept in ``work``."""
    file = work / "text.pt"
    if not file.exists():
        pieces, held_out = _text(plan)
        first, second = cluster(pieces, held_out, plan.experts, plan.seed)
        found = {
            "training": [_encode(tokenizer, _of(pieces, first, n)) for n in range(plan.experts)],
            "held_out": [_encode(tokenizer, _of(held_out, second, n)) for n in range(plan.experts)],
            "pieces": np.bincount(first, minlength=plan.experts).tolist(),
            "words": _words_of(pieces, first, plan.experts),
        }
        torch.save(found, file)
    return dict(torch.load(file, weights_only=True))


def _of(pieces: Sequence[str], labels: np.ndarray, number: int) -> list[str]:
    return [piece for piece, label in zip(pieces, labels, strict=True) if label == number]


def _text(plan: MixPlan) -> tuple[list[str], list[str]]:
    """Pieces of text to train on, and others that are held out."""
    kinds: dict[tuple[str, bool], list[str]] = {}
    for document in documents():
        kinds.setdefault((document.kind, document.held_out), []).extend(_pieces(document.text))
        if document.kind == "code":
            kinds.setdefault(("prose", document.held_out), []).extend(_pieces("\n\n".join(_docstrings(document.text))))
    talks = [p["prompt"] for p in prompt_sets.PROMPT_SETS["conversation"].prompts(plan.pieces // 4, "mix")]
    kept = len(talks) // 8
    kinds["conversation", True], kinds["conversation", False] = talks[:kept], talks[kept:]
    choose = random.Random(plan.seed)
    for found in kinds.values():
        choose.shuffle(found)
    training, held_out = (
        [piece for (_, held), found in kinds.items() if held == wanted for piece in found[: plan.pieces]]
        for wanted in (False, True)
    )
    return training, held_out


def _pieces(text: str) -> Iterator[str]:
    for start in range(0, len(text), PIECE_CHARACTERS):
        piece = text[start : start + PIECE_CHARACTERS]
        if len(piece) > PIECE_CHARACTERS // 4:
            yield piece


def _docstrings(source: str) -> Iterator[str]:
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from filter(None, [ast.get_docstring(node)])


def cluster(pieces: Sequence[str], others: Sequence[str], count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The cluster of each piece by its words, int ``[pieces]``, and of others, which have no part in finding clusters.

    K-means on reduced tf-idf vectors, as in c-BTM.
    """
    from sklearn.cluster import KMeans
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.preprocessing import normalize

    words = TfidfVectorizer(sublinear_tf=True, min_df=min(5, len(pieces) // 8), max_df=0.5)
    vectors = words.fit_transform(pieces)
    reduction = TruncatedSVD(min(64, vectors.shape[1] - 1), random_state=seed)
    means = KMeans(count, n_init=4, random_state=seed)
    found = means.fit_predict(normalize(reduction.fit_transform(vectors)))
    return np.asarray(found), np.asarray(means.predict(normalize(reduction.transform(words.transform(others)))))


def _words_of(pieces: Sequence[str], labels: np.ndarray, count: int) -> list[str]:
    """The words that are most particular to each cluster, for people who read the card."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    joined = [" ".join(_of(pieces, labels, number)) for number in range(count)]
    fitted = TfidfVectorizer(sublinear_tf=True, token_pattern=r"\b[a-zA-Z]{3,}\b")  # noqa: S106 - a pattern
    weights = fitted.fit_transform(joined).toarray()
    names = fitted.get_feature_names_out()
    return [" ".join(names[row.argsort()[::-1][:6]]) for row in weights]


def _encode(tokenizer: Any, pieces: Sequence[str]) -> torch.Tensor:
    ids = [
        token
        for piece in pieces
        for token in [*tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"], tokenizer.eos_token_id]
    ]
    return torch.tensor(ids, dtype=torch.int64)


def _windows(stream: torch.Tensor, context: int, count: int, seed: int) -> torch.Tensor:
    """``count`` random windows, int64 ``[count, context]``; a short stream is repeated."""
    if len(stream) <= context:
        stream = stream.repeat(context // max(1, len(stream)) + 2)
    generator = torch.Generator().manual_seed(seed)
    places = torch.randint(0, len(stream) - context, (count,), generator=generator)
    return torch.stack([stream[place : place + context] for place in places])


def _branch(source: Path, stream: torch.Tensor, plan: MixPlan, number: int, work: Path, report: Report) -> None:
    """Train the feed-forward layers of one copy of the model and keep them, in bfloat16."""
    from transformers import LlamaForCausalLM

    file = work / f"branch{number}.pt"
    if file.exists():
        return
    model = LlamaForCausalLM.from_pretrained(source, dtype=torch.float32).train()
    model.requires_grad_(False)
    trained = {name: value for name, value in model.named_parameters() if ".mlp." in name}
    for value in trained.values():
        value.requires_grad_(True)
    optimizer = torch.optim.AdamW(trained.values(), lr=plan.rate, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / plan.steps)
    windows = _windows(stream, plan.context, plan.steps * plan.batch, plan.seed + number)
    for step, tokens in enumerate(windows.split(plan.batch), 1):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        report(f"branch {number + 1} of {plan.experts}", step, plan.steps, loss.item())
    torch.save({name: value.detach().to(torch.bfloat16) for name, value in trained.items()}, file)


def mix(
    base: LlamaForCausalLM, branches: Sequence[Path], windows: Sequence[torch.Tensor], plan: MixPlan
) -> MixtralForCausalLM:
    """The mixture: the branches' feed-forward layers behind a router that knows their text.

    Args:
        base: what the branches were copied from, float32.
        branches: files with the weights that each branch has trained.
        windows: int64 ``[windows, context]`` per branch, text of its cluster.
        plan: the shape.

    """
    from transformers import MixtralForCausalLM

    size = base.config.intermediate_size
    new = MixtralForCausalLM(upcycling.config(base.config, upcycling.Experts(plan.experts, plan.chosen, size))).float()
    shared = {name: value for name, value in base.state_dict().items() if ".mlp." not in name}
    new.load_state_dict(shared, strict=False)
    with torch.no_grad():
        for number, file in enumerate(branches):
            weights = torch.load(file, weights_only=True)
            for place, layer in enumerate(new.model.layers):
                gate, up, down = (
                    weights[f"model.layers.{place}.mlp.{name}_proj.weight"] for name in ("gate", "up", "down")
                )
                layer.mlp.experts.gate_up_proj[number].copy_(torch.cat([gate, up]))
                layer.mlp.experts.down_proj[number].copy_(down)
        belongs = torch.cat([torch.full((w.numel(),), n) for n, w in enumerate(windows)])
        wanted = torch.nn.functional.one_hot(belongs, plan.experts).float()
        for layer, inputs in zip(
            new.model.layers, upcycling.feed_forward_inputs(base, torch.cat(list(windows))), strict=True
        ):
            logits = upcycling.linear_fit(inputs, wanted)
            layer.mlp.gate.weight.copy_(upcycling.ROUTER_DEVIATION * logits.T)
    return new.eval()


def evaluate(base: Any, mixture: Any, streams: Sequence[torch.Tensor], context: int) -> list[dict[str, float] | None]:
    """On held-out text per cluster: losses of base and mixture in nats per token, and the share of the top expert.

    None for a cluster without held-out text.
    """
    found: list[dict[str, float] | None] = []
    for stream in streams:
        if not len(stream):
            found.append(None)
            continue
        tokens = _windows(stream, context, 2, 1)
        with torch.inference_mode():
            own = mixture(input_ids=tokens, labels=tokens, output_router_logits=True)
            dense = base(input_ids=tokens, labels=tokens)
            picks = torch.stack(
                [logits.topk(mixture.config.num_experts_per_tok, -1).indices for logits in own.router_logits]
            )
        shares = torch.bincount(picks.flatten(), minlength=mixture.config.num_local_experts) / picks.numel()
        # The mixture's own `loss` includes the load-balancing term.
        loss = torch.nn.functional.cross_entropy(own.logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        found.append(
            {
                "base_loss": round(dense.loss.item(), 4),
                "mixture_loss": round(loss.item(), 4),
                "expert": int(shares.argmax()),
                "expert_share": round(shares.max().item(), 3),
            }
        )
    return found
