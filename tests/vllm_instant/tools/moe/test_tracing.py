"""Prompts for a trace, read from files."""

import pytest

from vllm_instant.tools.measure.closed_loop import PromptSpec
from vllm_instant.tools.moe.tracing import TracingError, read_prompts


def test_text_files_hold_one_prompt_per_line(tmp_path):
    path = tmp_path / "code.txt"
    path.write_text("first\n\nsecond\n")
    assert read_prompts(path) == [PromptSpec("first", 0.0, "code"), PromptSpec("second", 0.0, "code")]


def test_json_lines_may_name_class_and_temperature(tmp_path):
    path = tmp_path / "mixed.jsonl"
    path.write_text('{"prompt": "a", "class": "chat", "temperature": 0.7}\n{"prompt": "b"}\n')
    assert read_prompts(path) == [PromptSpec("a", 0.7, "chat"), PromptSpec("b", 0.0, "mixed")]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1: expected an object with a prompt"),
        ("{}", "line 1: expected an object with a prompt, prompt: Field required"),
        ('{"prompt": 3}', "line 1: expected an object with a prompt, prompt: Input should be a valid string"),
        ('{"prompt": "a", "class": 1}', "class: Input should be a valid string"),
        ("", "has no prompts"),
    ],
)
def test_invalid_lines_are_refused_in_one_sentence(tmp_path, line, message):
    path = tmp_path / "prompts.jsonl"
    path.write_text(line)
    with pytest.raises(TracingError, match=message):
        read_prompts(path)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(TracingError, match="cannot be read"):
        read_prompts(tmp_path / "none.txt")
