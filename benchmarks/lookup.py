"""Lookup drafters without an engine: ``suffix`` beside the suffix trees of Arctic Inference, on the same tokens.

.venv/bin/python benchmarks/lookup.py --arctic FOLDER

FOLDER holds ``arctic-inference``, which this package does not depend on: ``pip install --no-deps --target FOLDER
arctic-inference``. Answers are replayed token by token, as a greedy server would generate them; the texts come from the
standard library of the running Python. Accepted and drafted tokens are per step of a request; the time is that of one
step's lookup, append included, the median over all steps.
"""

from __future__ import annotations

import argparse
import ast
import json
import random
import re
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from results import write
from rich.console import Console
from rich.table import Table

from vllm_instant import Drafter, DraftRequest
from vllm_instant.tools.cli.drafter_replay import ReplayedRequest, word_tokenizer
from vllm_instant.tools.demo.corpus import documents
from vllm_instant_plugins.suffix.drafter import SuffixDrafter
from vllm_instant_plugins.suffix.index import TokenIndex

MAX_DRAFT_TOKENS = 16
VOCAB_SIZE = 1 << 20
HISTORY_TOKENS = 1_000_000
MAX_MODEL_LEN = 32_768
FACTORS = (1.0, 4.0)
"""Arctic's ``max_spec_factor``: draft tokens per token of the match."""


class ArcticDrafter(Drafter):
    """Arctic Inference's ``SuffixDecodingCache`` as vLLM's ``suffix`` method drives it.

    Args:
        factor: ``max_spec_factor``.
        min_probability: ``min_token_prob``; vLLM's default.

    """

    def __init__(self, factor: float, min_probability: float = 0.1) -> None:
        from arctic_inference.suffix_decoding import SuffixDecodingCache

        self._cache = SuffixDecodingCache(max_tree_depth=24, max_cached_requests=10_000)
        self._factor, self._min_probability = factor, min_probability
        self._seen: dict[str, int] = {}

    def propose(self, requests: Sequence[DraftRequest]) -> list[list[int]]:
        """One lookup per request."""
        return [self._propose(request) for request in requests]

    def _propose(self, request: DraftRequest) -> list[int]:
        name, tokens = request.request_id, request.token_ids
        if name not in self._seen:
            self._cache.start_request(name, tokens[: request.num_prompt_tokens])
            self._seen[name] = request.num_prompt_tokens
        self._cache.add_active_response(name, tokens[self._seen[name] :].tolist())
        self._seen[name] = len(tokens)
        draft = self._cache.speculate(
            name,
            tokens[-24:],
            max_spec_tokens=request.max_draft_tokens,
            max_spec_factor=self._factor,
            min_token_prob=self._min_probability,
        )
        return list(draft.token_ids)

    def forget(self, request_id: str) -> None:
        """Move the answer into the tree of all answers."""
        if self._seen.pop(request_id, None) is not None:
            self._cache.stop_request(request_id)


# ---------------------------------------------------------------------------------------------------------- texts


def functions(source: str) -> Iterator[str]:
    """The functions of a module with 8 to 60 lines."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            text = ast.get_source_segment(source, node) or ""
            if 8 <= text.count("\n") <= 60:
                yield text


def edited(function: str, choose: random.Random) -> str:
    """The function with one argument or variable renamed, and one line more."""
    names = sorted(set(re.findall(r"\b[a-z_]{4,}\b(?= =)", function))) or ["self"]
    name = choose.choice(names)
    lines = re.sub(rf"\b{name}\b", f"new_{name}", function).splitlines()
    lines.insert(choose.randrange(2, len(lines)), "    # checked")
    return "\n".join(lines)


def paragraphs(source: str) -> Iterator[str]:
    """Paragraphs of prose in the docstrings of a module."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module):
            for part in (ast.get_docstring(node) or "").split("\n\n"):
                if len(part) > 200 and part[0].isupper() and ">>>" not in part:
                    yield " ".join(part.split())


def classes(count: int, seed: int) -> dict[str, list[tuple[str, str]]]:
    """By class, prompts and answers."""
    choose = random.Random(seed)
    sources = {document.name: document.text for document in documents() if document.kind == "code"}
    described = [document.text for document in documents() if document.kind == "structured"]
    code = [function for text in sources.values() for function in functions(text)]
    prose = [paragraph for text in sources.values() for paragraph in paragraphs(text)]
    chosen = choose.sample(code, 3 * count)
    records = [choose.sample(text.splitlines(), 6) for text in described if text.count("\n") >= 12]
    choose.shuffle(records)
    pretty = [(lines, json.dumps([json.loads(line) for line in lines], indent=1)) for lines in records[:count]]
    agents = []
    for function in chosen[2 * count :]:
        change = edited(function, choose)
        path = f"src/{choose.randrange(100)}.py"
        prompt = f"read_file({path!r})\n{function}\nTask: rename and check."
        answer = (
            f"edit_file({path!r}, old='''\n{function}\n''', new='''\n{change}\n''')\nread_file({path!r})\n{change}\n"
        )
        agents.append((prompt, answer + "The file is changed."))
    return {
        "code edit": [(f"Rename a variable:\n{text}\n", edited(text, choose)) for text in chosen[:count]],
        "new code": [(f"Write {text.splitlines()[0]}\n", text) for text in chosen[count : 2 * count]],
        "prose": [("Explain.\n", text) for text in choose.sample(prose, count)],
        "JSON": [("As a JSON list:\n" + "\n".join(lines) + "\n", text) for lines, text in pretty],
        "agent": agents,
    }


# -------------------------------------------------------------------------------------------------------- measuring


def measured(build: Callable[[], Drafter], requests: Sequence[ReplayedRequest]) -> dict[str, float]:
    """Accepted and drafted tokens per step, and the median microseconds of a step."""
    drafter = build()
    steps = drafted = accepted = 0
    seconds = []
    for number, request in enumerate(requests):
        tokens = np.array([*request.prompt, *request.answer], np.int32)
        following = tokens.tolist()
        end = len(request.prompt) + 1
        while end < len(tokens):
            asked = DraftRequest(str(number), tokens[:end], len(request.prompt), MAX_DRAFT_TOKENS, "all")
            started = time.perf_counter()
            [draft] = drafter.propose([asked])
            seconds.append(time.perf_counter() - started)
            proposed = getattr(draft, "token_ids", draft)
            kept = next(
                (i for i, token in enumerate(proposed) if end + i >= len(following) or token != following[end + i]),
                len(proposed),
            )
            steps, drafted, accepted = steps + 1, drafted + len(proposed), accepted + kept
            end += kept + 1
        drafter.forget(str(number))
    return {
        "accepted": accepted / steps,
        "drafted": drafted / steps,
        "microseconds": 1e6 * float(np.median(seconds)),
        "steps": steps,
    }


def history_bytes_per_token() -> float:
    """Memory of the history index per token that it holds."""
    tracemalloc.start()
    TokenIndex(HISTORY_TOKENS)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return peak / HISTORY_TOKENS


def main() -> None:
    """Measure, print, and write ``benchmarks/results/lookup.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arctic", type=Path, required=True, help="folder with the package arctic-inference")
    parser.add_argument("--requests", type=int, default=60, help="requests of each class (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results/lookup.json")
    options = parser.parse_args()
    sys.path.append(str(options.arctic))
    drafters: dict[str, Callable[[], Drafter]] = {
        "suffix": lambda: SuffixDrafter(MAX_MODEL_LEN, HISTORY_TOKENS, share_across_cache_salts=True)
    }
    for factor in FACTORS:
        drafters[f"Arctic, factor {factor:g}"] = lambda factor=factor: ArcticDrafter(factor)  # type: ignore[misc]
    encode = word_tokenizer()
    cells: list[dict[str, Any]] = []
    table = Table("class", "drafter", "accepted per step", "drafted per step", "µs per step, median")
    for name, texts in classes(options.requests, 5).items():
        requests = [ReplayedRequest(encode(prompt), encode(answer)) for prompt, answer in texts]
        for drafter, build in drafters.items():
            measured(build, requests[:2])  # compiles
            found = measured(build, requests)
            cells.append({"class": name, "drafter": drafter, **found})
            table.add_row(
                name,
                drafter,
                f"{found['accepted']:.2f}",
                f"{found['drafted']:.2f}",
                f"{found['microseconds']:.0f}",
            )
    Console().print(table)
    print(f"history of suffix: {history_bytes_per_token():.1f} bytes per token")
    write(options.output, cells, name=f"{options.requests} requests of each class")


if __name__ == "__main__":
    main()
