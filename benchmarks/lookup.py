"""``suffix`` beside the suffix decoding cache of Arctic Inference on the same token streams, without an engine.

    pip install --no-deps arctic-inference==0.3.0
    .venv/bin/python benchmarks/lookup.py

Five classes of text whose answers are known: edited source code, new functions (HumanEval), prose (Python's reference),
JSON records and the turns of an agent. Each answer is generated again token by token, as a greedy server would that
answers with exactly this text, by the tokenizer of the demo's chat model. A draft costs rows of a verification, so that
accepted and drafted tokens per step belong together: ``suffix`` is cut at several probabilities, as ``goodput`` cuts it
at the one that pays, and Arctic's cache runs with vLLM's settings and two larger ``max_spec_factor``. Times are medians
over the steps of all passes, with the classes and the arms alternating.
"""

from __future__ import annotations

import argparse
import builtins
import importlib
import importlib.util
import itertools
import json
import keyword
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from results import HERE, write

from vllm_instant import Draft, Drafter, DraftRequest
from vllm_instant.tools.cli.drafter_replay import Replay, ReplayedRequest, replay
from vllm_instant.tools.demo.corpus import documents
from vllm_instant.tools.demo.prompt_sets import human_eval_problems
from vllm_instant_plugins.suffix.drafter import SuffixDrafter
from vllm_instant_plugins.suffix.request_lookup import MIN_SURVIVAL

MAX_DRAFT_TOKENS = 16
MAX_CHARACTERS = 6000
HISTORY_TOKENS = 1_000_000
SURVIVALS = (MIN_SURVIVAL, 0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
FACTORS = (1.0, 2.0, 4.0)
MAX_TREE_DEPTH, MIN_TOKEN_PROB = 24, 0.1
"""vLLM's defaults of ``suffix_decoding_max_tree_depth`` and ``suffix_decoding_min_token_prob``."""

Texts = Iterator[tuple[str, str]]
"""Prompts with their answers."""


def code_edits() -> Texts:
    """A module of the standard library in which one name is changed."""
    for name, source in _modules():
        old, new = _frequent_name(source), "renamed"
        yield f"Rename `{old}` to `{new}` in {name} and repeat it:\n{source}\n", _renamed(source, old, new)


def new_code() -> Texts:
    """Functions of HumanEval."""
    for problem in human_eval_problems():
        yield f"Complete this Python function:\n{problem['prompt']}", problem["canonical_solution"]


def prose() -> Texts:
    """Topics of Python's language reference."""
    from pydoc_data.topics import topics

    for name, text in sorted(topics.items()):
        yield f"Explain {name} in Python.\n", text[:MAX_CHARACTERS]


def records() -> Texts:
    """One JSON object per function and class of a module."""
    sources = {found.name: found.text for found in documents(held_out_only=True) if found.kind == "code"}
    for found in documents(held_out_only=True):
        if found.kind == "structured":
            source = sources.get(found.name, "")[:MAX_CHARACTERS]
            yield f"Describe {found.name} as JSON lines:\n{source}\n", found.text[:MAX_CHARACTERS]


def agent_turns() -> Texts:
    """An agent that reads a module and renames a name in it line by line; each of its turns is a request."""
    for name, source in _modules():
        old, new = _frequent_name(source), "renamed"
        said = f"user: Rename `{old}` to `{new}` in {name}.\n"
        lines = [line for line in dict.fromkeys(source.splitlines()) if re.search(rf"\b{old}\b", line)][:8]
        turns = [({"tool": "read_file", "arguments": {"path": name}}, source)]
        for line in lines:
            arguments = {"path": name, "old": line, "new": _renamed(line, old, new)}
            turns.append(({"tool": "replace", "arguments": arguments}, f"{name}: 1 line replaced"))
        for call, result in turns:
            prompt, answer = f"{said}assistant: ", json.dumps(call)
            yield prompt, answer
            said = f"{prompt}{answer}\ntool: {result}\n"
        yield f"{said}assistant: ", f"I renamed `{old}` to `{new}` in {len(lines)} lines of {name}."


CLASSES: dict[str, Callable[[], Texts]] = {
    "code edit": code_edits,
    "new code": new_code,
    "prose": prose,
    "JSON": records,
    "agent": agent_turns,
}


def _modules() -> Iterator[tuple[str, str]]:
    """Names and beginnings of modules of the standard library."""
    for found in documents(held_out_only=True):
        if found.kind == "code" and len(found.text) > 1000:
            yield found.name, found.text[:MAX_CHARACTERS].rpartition("\n")[0]


def _frequent_name(source: str) -> str:
    """The name that occurs most often."""
    names = Counter(re.findall(r"\b[A-Za-z_]{4,}\b", source))
    known = {*keyword.kwlist, *dir(builtins)}
    return next(name for name, _ in sorted(names.items(), key=lambda found: -found[1]) if name not in known)


def _renamed(text: str, old: str, new: str) -> str:
    return re.sub(rf"\b{old}\b", new, text)


class Cut(Drafter):
    """``suffix``, whose drafts end where the probability that all of it is accepted falls below a limit."""

    def __init__(self, max_model_len: int, survival: float) -> None:
        self.drafter = SuffixDrafter(max_model_len, HISTORY_TOKENS, share_across_cache_salts=True)
        self.drafter.warm_up()
        self._survival = survival

    def propose(self, requests: Sequence[DraftRequest]) -> list[Draft]:
        """See ``Drafter.propose``."""
        found = self.drafter.propose(requests)
        if self._survival <= MIN_SURVIVAL:
            return found
        return [self._cut(draft) for draft in found]

    def _cut(self, draft: Draft) -> Draft:
        survival = itertools.accumulate(draft.confidence, float.__mul__)
        kept = sum(1 for _ in itertools.takewhile(lambda value: value >= self._survival, survival))
        return Draft(draft.token_ids[:kept], draft.confidence[:kept])

    def forget(self, request_id: str) -> None:
        """See ``Drafter.forget``."""
        self.drafter.forget(request_id)

    def history_bytes(self) -> float:
        """Bytes of the history that hold tokens; all of it is allocated at start."""
        return self.drafter.history_bytes() / HISTORY_TOKENS * self.drafter.num_history_tokens


class Arctic(Drafter):
    """``SuffixDecodingCache`` of Arctic Inference, used as vLLM's ``suffix`` uses it."""

    def __init__(self, max_spec_factor: float) -> None:
        # Not among this project's dependencies: see above.
        arctic = importlib.import_module("arctic_inference.suffix_decoding")
        self.cache = arctic.SuffixDecodingCache(max_tree_depth=MAX_TREE_DEPTH, max_cached_requests=10_000)
        self._factor = max_spec_factor
        self._seen: dict[str, int] = {}

    def propose(self, requests: Sequence[DraftRequest]) -> list[list[int]]:
        """See ``Drafter.propose``."""
        return [self._propose(request) for request in requests]

    def _propose(self, request: DraftRequest) -> list[int]:
        name, tokens = request.request_id, request.token_ids
        seen = self._seen.get(name)
        if seen is None:
            seen = request.num_prompt_tokens
            self.cache.start_request(name, tokens[:seen])
        self.cache.add_active_response(name, tokens[seen:])
        self._seen[name] = len(tokens)
        found = self.cache.speculate(
            name,
            tokens[-MAX_TREE_DEPTH:],
            max_spec_tokens=request.max_draft_tokens,
            max_spec_factor=self._factor,
            min_token_prob=MIN_TOKEN_PROB,
        )
        return list(found.token_ids)

    def forget(self, request_id: str) -> None:
        """See ``Drafter.forget``."""
        if self._seen.pop(request_id, None) is not None:
            self.cache.stop_request(request_id)

    def history_bytes(self) -> float:
        """Bytes of the tree with all outputs, as it estimates itself."""
        return float(self.cache._global_tree.estimate_memory())


def streams(tokens_per_class: int) -> dict[str, list[ReplayedRequest]]:
    """The requests of each class, with this many tokens to generate or a few less."""
    from transformers import AutoTokenizer

    from vllm_instant.tools.demo.real_model import prepare

    tokenizer = AutoTokenizer.from_pretrained(str(prepare()))
    found: dict[str, list[ReplayedRequest]] = {}
    for name, texts in CLASSES.items():
        requests, room = [], tokens_per_class
        for prompt, answer in texts():
            request = ReplayedRequest(tokenizer.encode(prompt), tokenizer.encode(answer)[:room])
            if len(request.answer) < 2:
                break
            room -= len(request.answer)
            requests.append(request)
        found[name] = requests
    return found


def arms(max_model_len: int) -> dict[tuple[str, float], Callable[[], Cut | Arctic]]:
    """Drafters by name and setting."""
    ours = {("suffix", value): lambda value=value: Cut(max_model_len, value) for value in SURVIVALS}
    theirs = {("arctic", value): lambda value=value: Arctic(value) for value in FACTORS}
    return {**ours, **theirs}


def main() -> None:
    """Replay, print, write ``benchmarks/results/lookup.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=45_000, help="tokens to generate per class")
    parser.add_argument("--passes", type=int, default=2, help="how often everything is replayed, for the times")
    parser.add_argument("--output", type=Path, default=HERE / "results/lookup.json")
    options = parser.parse_args()
    if importlib.util.find_spec("arctic_inference") is None:
        parser.error("arctic-inference is not installed: pip install --no-deps arctic-inference==0.3.0")
    requests = streams(options.tokens)
    vocab = 1 + max(t for found in requests.values() for r in found for t in (*r.prompt, *r.answer))
    length = max(len(r.prompt) + len(r.answer) for found in requests.values() for r in found) + MAX_DRAFT_TOKENS
    replays: dict[tuple[str, str, float], list[Replay]] = {}
    memory: dict[tuple[str, str, float], float] = {}
    builders = arms(length)
    for _, name, (arm, setting) in itertools.product(range(options.passes), CLASSES, builders):
        used: list[Cut | Arctic] = []

        def build(arm: str = arm, setting: float = setting, used: list[Cut | Arctic] = used) -> Cut | Arctic:
            used.append(builders[arm, setting]())
            return used[-1]

        found = replay(build, requests[name], MAX_DRAFT_TOKENS, vocab)
        replays.setdefault((name, arm, setting), []).append(found)
        memory[name, arm, setting] = used[-1].history_bytes() / found.generated
    cells = [{**_cell(*key, found), "bytes_per_history_token": memory[key]} for key, found in replays.items()]
    for cell in cells:
        print(
            f"{cell['class']:10} {cell['arm']:7} {cell['setting']:4} accepted {cell['accepted']:6.3f} drafted "
            f"{cell['drafted']:6.2f} µs p50 {cell['microseconds_p50']:5.1f} mean {cell['microseconds_mean']:5.1f}"
        )
    write(options.output, cells)


def _cell(name: str, arm: str, setting: float, passes: Sequence[Replay]) -> dict[str, Any]:
    first, times = passes[0], np.concatenate([found.step_seconds for found in passes]) * 1e6
    return {
        "class": name,
        "arm": arm,
        "setting": setting,
        "generated": first.generated,
        "steps": first.steps,
        "accepted": first.accepted_per_step,
        "drafted": first.drafted / first.steps,
        "microseconds_p50": float(np.median(times)),
        "microseconds_mean": float(times.mean()),
    }


if __name__ == "__main__":
    main()
