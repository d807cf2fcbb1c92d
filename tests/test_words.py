"""Words that do not occur in this project: archaic or coined ones, indirect quantities, "a" for "per", metaphors.

A vLLM engineer should read every name, message and page without a glossary. Each rule says what to write instead. Where
a word is truly right (a quotation, an option that users have typed), its file is listed with the words in ``ALLOWED``.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

_UNIT = (
    "tokens?|ms|milliseconds|seconds?|requests?|bytes|times|once|steps?|drafts?|messages?|files?|lengths?|questions?|"
    "launch(?:es)?|MiB|entry|entries|rows?|chunks|answers|objects?|prompt|lists?|accepted|one"
)
_EACH = "second|step|token|file|layer|slot|patch|head|position|worker|rank|row|draft|line|day|hour"
# Names that were replaced throughout; an old one that returns would be a second name for one thing.
_RETIRED = [
    "Seam",
    "DraftPrice",
    "worthwhile",
    "StatesOnDemand",
    "told_output_tokens",
    "held_prefixes",
    "DraftRows",
    "draft_rows",
    "SpeculationBudget",
    "while_the_model_runs",
    "QueueMoment",
    "SharingDrafter",
    "DraftModelKeeper",
    "draft_skipping",
    "draft_sharing",
    "DraftSharer",
    "plain_sampling",
    "undrafted_sampling",
    "kernel_scan",
    "cpu_seeds",
    "worker_messages",
    "rotating_attention",
    "expert_steps",
    "drafting_balance",
    "model_drafted",
    "let_go",
    "give_back",
    "KeptFile",
    "TokenGate",
    "why_not",
    "contradictions",
    "BatchingPolicy",
]
RULES = {
    rf"\b(?:{_UNIT}) an? (?:{_EACH})\b": 'rates take "per"',
    r"\b(?:tokens?|steps?|drafts?|bytes|rows?|ms|messages?|lists?) a request\b": 'rates take "per"',
    r"\b(?:nobody|somebody|anybody|everybody|whoever|whom)\b": 'a request, a client or a machine is "it" or "one that"',
    r"\b(?:he|his|him)\b": 'a request, a client or a machine is "it"',
    r"foretell|foretold": "predict",
    r"\bshall\b": 'the present tense, or "must"',
    r"\bseldom\b": "rarely",
    r"\bdear\b": "expensive",
    r"\bspare\b": "name the quantity, for example preemption order or free blocks",
    r"\bso many\b": "name the limit or the number",
    r"\bthose that\b": "name the things: requests that, drafts that",
    r"\bgoes on\b": "continues",
    r"\bc[ao]mes? true\b": "is accepted, holds",
    r"policy as it is|not to be told from": "name the commit; indistinguishable from",
    r"\b(?:roster|allowance|silences?|circumstances|unwillingly)\b": "table, budget, misses, environment",
    r"\bseams?\b": "patch",
    r"\bobjections?\b": "reason",
    r"\b_?(?:most|least|longest|fewest)_": "max_, min_",
    rf"(?-i:\b(?:{'|'.join(_RETIRED)})\b)": "the name that replaced it; git log -S shows which",
}
BANNED = re.compile("|".join(f"(?P<r{number}>{rule})" for number, rule in enumerate(RULES)), re.IGNORECASE)

SKIPPED = (
    "LICENSE",
    "benchmarks/results/",  # recorded by earlier versions of the programs
    "examples/demo_models/",  # vocabularies of tokenizers
    "tests/loadtests/recorded/",
    "tests/test_words.py",
)
TEXT = {".py", ".md", ".toml", ".html", ".css", ".yml", ".yaml", ".json", ".cfg", ""}
USER_TYPED = ("longest_piece",)
"""Keys of deployment files that must stay valid."""
ALLOWED = {
    "CHANGELOG.md": {"worthwhile", "draftprice"},
    "docs/cpu.md": {"worker_messages"},  # a file of an earlier commit
    "docs/results.md": {"he", "his"},  # stories that a model wrote
}
"""File → words that are right in it, in lower case."""


def files() -> list[Path]:
    """Every text file under version control, and every new one."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    chosen = [ROOT / name for name in sorted(set(names)) if not name.startswith(SKIPPED)]
    return [path for path in chosen if path.suffix in TEXT and path.is_file() and not path.is_symlink()]


def findings(path: Path, text: str) -> list[str]:
    """``file:line: word (what to write instead)`` for each banned word of a text."""
    name = path.relative_to(ROOT).as_posix()
    allowed = ALLOWED.get(name, set())
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        for key in USER_TYPED:
            line = line.replace(key, "")
        for match in BANNED.finditer(line):
            if match[0].lower() not in allowed and match.lastgroup is not None:
                advice = list(RULES.values())[int(match.lastgroup[1:])]
                found.append(f"{name}:{number}: {match[0]!r} ({advice})")
    return found


def test_no_banned_word_occurs():
    found = [finding for path in files() for finding in findings(path, path.read_text())]
    assert not found, f"{len(found)} banned words:\n" + "\n".join(found)


@pytest.mark.parametrize(
    "line",
    [
        "tokens a second",
        "two drafts a request",
        "one file a seam",
        "DraftPrice()",
        "Nobody waits",
        "MOST_TOKENS = 3",
        "it foretells",
        "he waits",
    ],
)
def test_banned_words_are_found(line):
    assert findings(ROOT / "example.py", line)


@pytest.mark.parametrize(
    "line", ["tokens per second", "almost_done", "the", "this step", "at most one token", "does not answer a request"]
)
def test_other_words_are_not(line):
    assert not findings(ROOT / "example.py", line)


def test_every_exception_is_still_needed():
    for name, words in ALLOWED.items():
        text = (ROOT / name).read_text().lower()
        assert all(word in text for word in words), name
