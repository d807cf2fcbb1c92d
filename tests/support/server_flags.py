"""The servers of the table "same answers": flags of ``vllm serve``, each alone and each pair of them together."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import covertable
import numpy as np
from feature_answers import CLIENTS
from request_features import Feature
from safetensors.numpy import save_file

from vllm_instant.tools.measure.servers import Server

SPECULATION = "--speculative-config"
WORDS = ["--served-model-name", "demo", "--dtype", "float32", "--max-model-len", "1024", "--enforce-eager"]
TEMPLATE = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}answer:"
PROCESSOR = '''"""Allows even tokens only."""
from vllm.v1.sample.logits_processor import LogitsProcessor


class EvenTokens(LogitsProcessor):
    def __init__(self, vllm_config, device, is_pin_memory):
        pass

    @classmethod
    def validate_params(cls, params):
        return None

    def is_argmax_invariant(self):
        return False

    def update_state(self, batch_update):
        pass

    def apply(self, logits):
        logits[:, 1::2] = float("-inf")
        return logits
'''

# What each flag is about -> name -> words. The first of each is vLLM's default. ADAPTER and TEMPLATE stand for paths.
FLAGS: dict[str, dict[str, Sequence[str]]] = {
    "adapters": {"none": (), "lora": ("--enable-lora", "--lora-modules", "adapter=ADAPTER", "--max-lora-rank", "8")},
    "steps": {
        "default": (),
        "async": ("--async-scheduling",),
        "sync": ("--no-async-scheduling",),
        "ngram": (SPECULATION, '{"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 4}'),
    },
    "prefix cache": {
        "default": (),
        "off": ("--no-enable-prefix-caching",),
        "sha256_cbor": ("--prefix-caching-hash-algo", "sha256_cbor"),
        "xxhash": ("--prefix-caching-hash-algo", "xxhash"),
    },
    "prefill": {
        "default": (),
        "whole": ("--no-enable-chunked-prefill", "--max-num-batched-tokens", "1024"),
        "16 tokens": ("--max-num-batched-tokens", "16"),
        "96 tokens": ("--max-num-batched-tokens", "96"),
        "threshold": ("--long-prefill-token-threshold", "16"),
        "adaptive threshold": ("--long-prefill-token-threshold", "32", "--long-prefill-token-threshold-adaptive"),
        "scheduled tokens": ("--max-num-scheduled-tokens", "64"),
        "interval": ("--prefill-schedule-interval", "2"),
    },
    "places": {
        "default": (),
        "one": ("--max-num-seqs", "1"),
        "three": ("--max-num-seqs", "3"),
        "queue": ("--max-num-queued-reqs", "500"),
        "active": ("--max-num-active-seqs", "4"),
    },
    "order": {"default": (), "priority": ("--scheduling-policy", "priority")},
    "blocks": {
        "default": (),
        "16": ("--block-size", "16"),
        "64": ("--block-size", "64"),
        "few": ("--block-size", "32", "--num-gpu-blocks-override", "36"),
        "bytes": ("--kv-cache-memory-bytes", "200000000"),
        "no hybrid manager": ("--disable-hybrid-kv-cache-manager",),
        "no reserve": ("--no-scheduler-reserve-full-isl",),
        "watermark": ("--watermark", "0.05"),
    },
    "log-probabilities": {
        "default": (),
        "any number": ("--max-logprobs", "-1"),
        "processed": ("--logprobs-mode", "processed_logprobs"),
        "raw logits": ("--logprobs-mode", "raw_logits"),
        "processed logits": ("--logprobs-mode", "processed_logits"),
    },
    "generation": {
        "default": (),
        "vllm": ("--generation-config", "vllm"),
        "override": ("--override-generation-config", '{"top_k": 5, "repetition_penalty": 1.1}'),
        "seed": ("--seed", "7"),
        "few new tokens": ("--override-generation-config", '{"max_new_tokens": 12}'),
    },
    "processors": {
        "none": (),
        "even tokens": ("--logits-processors", "even_tokens:EvenTokens"),
    },
    "embeddings": {"default": (), "prompts": ("--enable-prompt-embeds",)},
    "grammars": {
        "default": (),
        "guidance": ("--structured-outputs-config", '{"backend": "guidance"}'),
        "outlines": ("--structured-outputs-config", '{"backend": "outlines"}'),
        "no spaces": ("--structured-outputs-config", '{"backend": "xgrammar", "disable_any_whitespace": true}'),
    },
    "tools": {
        "none": (),
        "hermes": ("--enable-auto-tool-choice", "--tool-call-parser", "hermes"),
        "left out": ("--exclude-tools-when-tool-choice-none",),
    },
    "reasoning": {"none": (), "granite": ("--reasoning-parser", "granite")},
    "template": {
        "default": (),
        "file": ("--chat-template", "TEMPLATE"),
        "openai content": ("--chat-template-content-format", "openai"),
        "of the request": ("--trust-request-chat-template",),
        "role": ("--response-role", "model"),
    },
    "output": {
        "default": (),
        "tokens as ids": ("--return-tokens-as-token-ids",),
        "usage": ("--enable-force-include-usage",),
        "prompt details": ("--enable-prompt-tokens-details",),
        "stream interval": ("--stream-interval", "4"),
    },
    "logs": {
        "default": (),
        "requests": ("--enable-log-requests", "--enable-log-outputs", "--max-log-len", "20"),
        "no statistics": ("--disable-log-stats",),
        "request metrics": ("--enable-per-request-metrics",),
        "iterations": ("--enable-logging-iteration-details",),
        "kv metrics": ("--kv-cache-metrics", "--kv-cache-metrics-sample", "0.5"),
        "quiet": ("--disable-uvicorn-access-log", "--uvicorn-log-level", "error"),
    },
    "server": {
        "default": (),
        "load": ("--enable-server-load-tracking",),
        "request ids": ("--enable-request-id-headers",),
        "no docs": ("--disable-fastapi-docs",),
        "tokenizer info": ("--enable-tokenizer-info-endpoint",),
        "two servers": ("--api-server-count", "2"),
        "threads": ("--renderer-num-workers", "2"),
    },
    "executor": {
        "default": (),
        "uni": ("--distributed-executor-backend", "uni"),
        "mp": ("--distributed-executor-backend", "mp"),
        "extension": ("--worker-extension-cls", "even_tokens.Extension"),
    },
    "model": {
        "default": (),
        "transformers": ("--model-impl", "transformers"),
        "no cascade": ("--disable-cascade-attn",),
        "no window": ("--disable-sliding-window",),
        "fp64": ("--use-fp64-gumbel",),
    },
    "events": {
        "none": (),
        "connector": (
            "--kv-transfer-config",
            '{"kv_connector": "ExampleConnector", "kv_role": "kv_both", '
            '"kv_connector_extra_config": {"shared_storage_path": "FOLDER/kv"}}',
        ),
        "events": ("--kv-events-config", '{"enable_kv_cache_events": true, "publisher": "null"}'),
    },
}
OURS: dict[str, dict[str, Sequence[str]]] = {
    "drafter": {
        "default": (),
        "draft model": ("--instant-set", "drafter.plugin=model", "--instant-set", "drafter.model=MODEL"),
        "hybrid": ("--instant-set", "drafter.plugin=hybrid", "--instant-set", "drafter.model=MODEL"),
        "ngram": ("--instant-set", "drafter.plugin=ngram"),
    },
    "policy": {
        "goodput": (),
        "off": ("--instant-set", "speculation.plugin=off"),
        "fixed": ("--instant-set", "speculation.plugin=fixed"),
    },
    "sampler": {"block": (), "token": ("--instant-set", "rejection_sampler.plugin=token")},
    "batching": {"fcfs": (), "similarity": ("--instant-set", "batching.plugin=similarity")},
    "streaming": {
        "off": (),
        "chunked": ("--instant-set", "streaming.plugin=chunked"),
        "resumable": ("--instant-set", "streaming.plugin=resumable"),
    },
}
"""Choices of our slots: words that only our server gets."""


IN_PARTS = {"--max-num-batched-tokens", "--long-prefill-token-threshold", "--max-num-scheduled-tokens"}
"""Flags with which prompts of the table are read in parts."""


@dataclass(frozen=True)
class Row:
    """One pair of servers: the flags of both, and what only ours gets."""

    name: str
    words: tuple[str, ...]
    ours: tuple[str, ...] = ()

    @property
    def clients(self) -> int:
        """How many requests are asked at a time: on CPUs vLLM's engine ends where some of a batch have an adapter."""
        return 1 if "--enable-lora" in self.words else CLIENTS

    def survives(self, feature: Feature) -> bool:
        """Whether vLLM's own engine survives the request on a CPU, and the answer is not chance.

        With adapters it ends at a request that scores its prompt, and at a seed where a prompt is read in parts.
        """
        if "--enable-lora" in self.words and feature.scores_prompt:
            return False
        if "--logits-processors" in self.words and feature.has_form:
            return False  # it may leave no token that is allowed
        return not (IN_PARTS.intersection(self.words) and "seed" in feature.body)

    @property
    def words_of_vllm(self) -> tuple[str, ...]:
        """The flags of vLLM's server: without drafts, since what they may change in its answers is not to be met."""
        if SPECULATION not in self.words:
            return self.words
        place = self.words.index(SPECULATION)
        return self.words[:place] + self.words[place + 2 :]


def single_rows() -> list[Row]:
    """Each flag alone, and each choice of a slot alone."""
    named = [f"{factor}: {level}" for factor, levels in (FLAGS | OURS).items() for level in list(levels)[1:]]
    return [Row("no flag", ()), *map(row_of, named)]


def pair_rows() -> list[Row]:
    """Rows in which any two flags, and any flag and any choice of a slot, occur together at least once.

    Flags that vLLM refuses together are of one kind.
    """
    factors = {**FLAGS, **OURS}
    rows = []
    for chosen in covertable.make({factor: list(levels) for factor, levels in factors.items()}):
        named = [f"{factor}: {level}" for factor, level in chosen.items() if level != next(iter(factors[factor]))]
        rows.append(row_of(*sorted(named)))
    return rows


def row_of(*names: str) -> Row:
    """The row of flags and choices by their names, ``factor: level``."""
    chosen = [name.split(": ") for name in names]
    words = [word for factor, level in chosen if factor in FLAGS for word in FLAGS[factor][level]]
    ours = [word for factor, level in chosen if factor in OURS for word in OURS[factor][level]]
    return Row(", ".join(names), tuple(words), tuple(ours))


def prepare(folder: Path, model: Path) -> Mapping[str, str]:
    """Make the files that flags name; returns what stands for their paths."""
    (folder / "template.jinja").write_text(TEMPLATE)
    (folder / "even_tokens.py").write_text(PROCESSOR + "\n\nclass Extension:\n    pass\n")
    _adapter(folder / "adapter", json.loads((model / "config.json").read_text()))
    found = {"ADAPTER": folder / "adapter", "TEMPLATE": folder / "template.jinja", "MODEL": model, "FOLDER": folder}
    return {name: str(path) for name, path in found.items()}


def with_paths(words: Sequence[str], paths: Mapping[str, str]) -> list[str]:
    """The words with the paths of the prepared files."""
    found = []
    for word in words:
        for name, path in paths.items():
            word = word.replace(name, path)
        found.append(word)
    return found


def serve(row: Row, ours: bool, paths: Mapping[str, str]) -> Server:
    """A server of the row that is not started yet, with ``prepare``'s files."""
    folder = Path(paths["FOLDER"])
    words = [*WORDS, *with_paths(row.words if ours else row.words_of_vllm, paths)]
    words += [] if "--max-num-seqs" in row.words else ["--max-num-seqs", "8"]
    if ours:
        words += ["--plugins", "vllm_instant", *with_paths(row.ours, paths)]
    python_path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    log = folder / ("ours.log" if ours else "vllm.log")
    return Server(paths["MODEL"], words, log=log, environment={"PYTHONPATH": python_path}, start_timeout=200)


def _adapter(folder: Path, config: Mapping[str, Any]) -> None:
    """A LoRA adapter of rank 4 on the query and value projections."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    size = config.get("head_dim") or hidden // heads
    generator, tensors = np.random.default_rng(5), {}
    for layer in range(config["num_hidden_layers"]):
        for name, count in (("q_proj", heads), ("v_proj", config["num_key_value_heads"])):
            prefix = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            tensors[f"{prefix}.lora_A.weight"] = generator.standard_normal((4, hidden)).astype("float32") / hidden**0.5
            tensors[f"{prefix}.lora_B.weight"] = 0.3 * generator.standard_normal((count * size, 4)).astype("float32")
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 4, "lora_dropout": 0.0}
    settings |= {"bias": "none", "target_modules": ["q_proj", "v_proj"], "base_model_name_or_path": ""}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
