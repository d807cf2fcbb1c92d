"""The deployment reaches every process: workers, API servers, offline engines."""

import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import httpx
import psutil
import pytest
from asking import ask_all, metrics_when
from deployments import DRAFT_MODEL, EXAMPLE

from vllm_instant.tools.measure.servers import serving_environment

PROPOSED, VLLM_PROPOSED = "vllm_instant:draft_tokens_proposed_total", "vllm:spec_decode_num_draft_tokens_total"


def test_two_tensor_parallel_workers(launch, prompts, expected):
    """The drafter plugin runs in both workers, the budget is decided once, and answers stay the same."""
    words = ["--tensor-parallel-size", "2"]
    with launch(EXAMPLE, *words, VLLM_CPU_OMP_THREADS_BIND="0|1") as server:
        answers = ask_all(server, prompts[:12])
        totals = metrics_when(server, lambda now: now.get("vllm_instant:draft_tokens_accepted_total", 0) > 0)
    assert answers == expected[:12]
    assert totals["vllm_instant:draft_tokens_accepted_total"] > 0


def test_two_api_servers_with_a_key_and_a_guard(launch, prompts, expected):
    """Requests of both API servers are counted once, our routes are behind the API key, and each server has the guard.

    A forbidden word of one answer ends that answer before the word, streamed and whole; all others are vLLM's.
    """
    asked = list(zip(prompts, expected, strict=True))[:12]
    number, word = _word_of_one_answer([answer for _, answer in asked])
    guard = f'\n[guard]\nplugin = "rules"\nside = "answer"\nwords = ["{word}"]\n'
    with launch(DRAFT_MODEL + guard, "--api-server-count", "2", "--api-key", "secret") as server:
        key = {"Authorization": "Bearer secret"}
        route = f"{server.url}/v1/instant/deployment"
        assert httpx.get(route).status_code == 401
        deployment = httpx.get(route, headers=key).json()

        def ask(prompt):
            body = {"model": "demo", "prompt": prompt, "max_tokens": 48, "temperature": 0, "ignore_eos": True}
            response = httpx.post(f"{server.url}/v1/completions", json=body, headers=key, timeout=300)
            (choice,) = response.json()["choices"]
            return choice["text"], choice["finish_reason"]

        # Four times the one that is stopped: a new connection each, so that both API servers get some.
        wanted = [prompt for prompt, _ in asked] + [prompts[number]] * 3
        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(ask, wanted))
        streamed = _streamed(server, key, prompts[number])
        totals = metrics_when(server, lambda now: 0 < now.get(PROPOSED, 0) == now[VLLM_PROPOSED])
    stopped = expected[number][: expected[number].lower().index(word)]
    for place, (answer, (_, whole)) in enumerate(zip(answers, [*asked, *[asked[number]] * 3], strict=True)):
        is_stopped = place == number or place >= len(asked)
        assert answer == ((stopped, "content_filter") if is_stopped else (whole, "length"))
    assert streamed == (stopped, "content_filter")
    assert deployment["slots"]["drafter"]["plugin"] == "model"
    assert totals[PROPOSED] == totals[VLLM_PROPOSED] > 0


def _word_of_one_answer(answers):
    """A word of ASCII letters that occurs in one of the answers, not at its beginning: its number, and the word."""
    texts = [answer.lower() for answer in answers]
    for number, text in enumerate(texts):
        for word in re.findall(r"(?<=[^a-z_])[a-z]{5,}(?=[^a-z_])", text[8:]):
            if sum(text.count(word) for text in texts) == 1:
                return number, word
    raise AssertionError("every word occurs twice")


def _streamed(server, headers, prompt):
    """Text and finish reason of a streamed completion."""
    body = {"model": "demo", "prompt": prompt, "max_tokens": 48, "temperature": 0, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, headers=headers, timeout=300) as response:
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line.startswith("data: {")]
    parts = [json.loads(line)["choices"][0] for line in lines]
    return "".join(part["text"] for part in parts), parts[-1]["finish_reason"]


OFFLINE = """
import json, sys
from vllm import LLM, SamplingParams

def main():
    target, file, prompts = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
    llm = LLM(target, dtype="float32", max_num_seqs=8, enforce_eager=True, additional_config={"vllm_instant": file})
    outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=48, ignore_eos=True), use_tqdm=False)
    core = llm.llm_engine.engine_core
    asked = core.call_utility("instant_totals") if hasattr(core, "call_utility") else core.engine_core.instant_totals()
    print(json.dumps({"texts": [o.outputs[0].text for o in outputs], "totals": asked}))

if __name__ == "__main__":
    main()
"""


@pytest.mark.parametrize("processes", [pytest.param("0", marks=pytest.mark.nightly), "1"])
def test_offline(processes, demo_pair, tmp_path, plugin_folder, prompts, expected):
    script, file = tmp_path / "offline.py", tmp_path / "deploy.toml"
    script.write_text(OFFLINE)
    file.write_text(DRAFT_MODEL.replace("DRAFT", str(demo_pair.draft)) + "[vllm]\nmax_model_len = 1024\n")
    result = subprocess.run(
        [sys.executable, str(script), str(demo_pair.target), str(file), json.dumps(prompts[:12])],
        capture_output=True,
        text=True,
        env={
            **serving_environment(),
            "PYTHONPATH": str(plugin_folder),
            "PATH": os.environ["PATH"],
            "VLLM_ENABLE_V1_MULTIPROCESSING": processes,
        },
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    answer = json.loads([line for line in result.stdout.splitlines() if line.startswith('{"texts"')][-1])
    assert answer["texts"] == expected[:12]
    assert answer["totals"]["speculation"]["proposed"] > 0


@pytest.mark.nightly
@pytest.mark.parametrize("words", [(), ("--api-server-count", "2")], ids=["one", "two API servers"])
def test_nothing_is_left_of_a_server_whose_front_end_was_killed(launch, words):
    """Of vLLM's own the engine core and the workers stay."""
    with launch("", *words) as server:
        front = psutil.Process(server.pid)
        family = [front, *front.children(recursive=True)]
        assert len(family) > 2 + 2 * bool(words)
        front.kill()
        _, left = psutil.wait_procs(family, timeout=20)
    assert left == []


def test_a_server_without_the_plugin_selected_is_plain_vllm(baseline):
    metrics = httpx.get(f"{baseline.url}/metrics").text
    assert "vllm_instant" not in metrics
    assert httpx.get(f"{baseline.url}/v1/instant/deployment").status_code == 404


COMPILED_LATE = """
import json, sys
from vllm import LLM, SamplingParams

def main():
    import torch
    from numba.core.dispatcher import Dispatcher

    def versions():
        found = {}
        for name, module in list(sys.modules.items()):
            if name.startswith("vllm_instant"):
                for key, item in vars(module).items():
                    if isinstance(item, Dispatcher):
                        found[name + "." + key] = len(item.signatures)
        found["torch"] = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        return found

    llm = LLM(sys.argv[1], max_num_seqs=8, enforce_eager=True, additional_config={"vllm_instant": sys.argv[2]})
    before = versions()
    text = "def add(self, other):\\n    self.total += other.total\\n    return self\\n" * 4
    for options in (
        {"temperature": 0.0}, {"temperature": 0.8}, {"temperature": 0.8, "top_p": 0.9}, {"temperature": 0.8, "seed": 3},
    ):
        sampling = SamplingParams(max_tokens=32, ignore_eos=True, **options)
        llm.generate([text + str(number) for number in range(3)], sampling, use_tqdm=False)
    core = llm.llm_engine.engine_core.engine_core
    after = versions()
    late = sorted(name for name in after if after[name] > before.get(name, 0))
    print(json.dumps({"late": late, "all": len(after), "totals": core.instant_totals()}))

if __name__ == "__main__":
    main()
"""


def test_nothing_is_compiled_for_the_first_requests(demo_pair, tmp_path):
    """A compiled function whose first call were a request's would stop all requests for a second or more."""
    script, file = tmp_path / "offline.py", tmp_path / "deploy.toml"
    script.write_text(COMPILED_LATE)
    # Lookups, a draft model, and verification with the distributions of its drafts.
    file.write_text(
        "[speculation]\nkeep_costs = false\n[vllm]\nmax_model_len = 1024\n"
        f'[drafter]\nplugin = "hybrid"\nmodel = "{demo_pair.draft}"\ndraft_sample_method = "probabilistic"\n'
    )
    result = subprocess.run(
        [sys.executable, str(script), str(demo_pair.target), str(file)],
        capture_output=True,
        text=True,
        env={**serving_environment(), "PATH": os.environ["PATH"], "VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    found = json.loads([line for line in result.stdout.splitlines() if line.startswith('{"late"')][-1])
    assert found["late"] == []
    assert found["all"] > 15
    assert found["totals"]["speculation"]["proposed"] > 0
