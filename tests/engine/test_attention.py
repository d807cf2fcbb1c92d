"""An attention plugin inside vLLM: our kernels in Triton's interpreter give the tokens of plain tensor operations."""

import json
import math
import re
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import httpx
import pytest
from asking import ask

from vllm_instant.tools.measure.servers import ServerError
from vllm_instant_kernels.cache_layout import row_bytes

PROMPT = "import os\nimport sys\n\ndef main(argv):\n    for name in argv:\n        print(name)\n\ndef main(argv):\n"
TOKENS = 8
# The interpreter's speed must not decide how much is drafted: every draft is verified.
DEPLOYMENT = '[attention]\nplugin = "{}"\n[speculation]\nplugin = "fixed"\n'
FED_FORWARD = """
[attention]
plugin = "plain_watched"
calls = "CALLS"
[speculation]
plugin = "fixed"
[drafter]
plugin = "model"
model = "DRAFT"
num_speculative_tokens = 2
"""


@pytest.fixture(scope="module")
def calls(tmp_path_factory):
    """File in which a server records its calls of the fused feed-forward."""
    return tmp_path_factory.mktemp("feed_forward") / "calls"


@pytest.fixture(scope="module")
def servers(launch, calls):
    """Our kernels interpreted; the reference, also with our feed-forward; vLLM's own FP8."""
    with ExitStack() as stack, ThreadPoolExecutor(3) as pool:

        def start(plugin, **environment):
            return stack.enter_context(launch(DEPLOYMENT.format(plugin), "--max-num-seqs", "4", **environment))

        def start_watched():
            # Compiled by Dynamo without Inductor, which is slow on a CPU.
            words = ["--max-num-seqs", "4", "--no-enforce-eager", "--compilation-config.backend", "eager"]
            deployment = FED_FORWARD.replace("CALLS", str(calls))
            return stack.enter_context(launch(deployment, *words, TRITON_INTERPRET="1"))

        starting = {
            "fp8_fused": pool.submit(start, "fp8_fused", TRITON_INTERPRET="1"),
            "plain": pool.submit(start, "plain"),
            "fp8": pool.submit(start, "fp8"),
            "watched": pool.submit(start_watched),
        }
        yield {plugin: future.result() for plugin, future in starting.items()}


def _said(server, tokens=TOKENS, **parameters):
    """Send several prompts at once, so that steps mix prefill chunks with decoding and verification."""
    prompts = [PROMPT, PROMPT[20:60]]
    with ThreadPoolExecutor(2) as pool:
        asked = pool.map(lambda p: ask(server, p, max_tokens=tokens, return_token_ids=True, **parameters), prompts)
        return [choices[0]["token_ids"] for choices in asked]


@pytest.fixture(scope="module")
def reference_tokens(servers):
    return _said(servers["plain"])


def test_tokens_are_those_of_plain_tensor_operations(servers, reference_tokens):
    fused = servers["fp8_fused"]
    found = _said(fused)
    assert found == reference_tokens
    assert all(len(tokens) == TOKENS for tokens in found)
    drafted = fused.metrics()["vllm:spec_decode_num_draft_tokens_total"]
    assert drafted > 0, "nothing was verified"
    assert "raised in" not in fused.log_text()
    assert "leaves layers to vLLM" not in fused.log_text()


def test_the_second_half_of_layers_in_three_launches(servers, calls, demo_pair):
    """It runs inside vLLM's compiled graph, in the target and in its draft model, and only in small batches."""
    watched = servers["watched"]
    tokens = httpx.post(f"{watched.url}/tokenize", json={"prompt": PROMPT}).json()["tokens"]
    assert len(tokens) > 16
    [found], [expected] = (
        ask(server, PROMPT, max_tokens=4, return_token_ids=True) for server in (watched, servers["plain"])
    )
    assert found["token_ids"] == expected["token_ids"]
    log = watched.log_text()
    for model in (demo_pair.target, demo_pair.draft):
        config = json.loads((model / "config.json").read_text())
        layers, hidden = config["num_hidden_layers"], config["hidden_size"]
        assert f"computes {layers} layers of {model} in batches of up to 16 tokens" in log
        rows = [int(r) for h, r in map(str.split, calls.read_text().splitlines()) if int(h) == hidden]
        # Each step runs all layers; the prompt's step is not a small batch.
        assert rows
        assert len(rows) % layers == 0
        assert set(rows) <= set(range(1, 17))
    assert "raised in" not in log


@pytest.mark.nightly
def test_rotation_and_write_are_one_launch(launch, reference_tokens):
    """No other code may rotate or write; the compiled model's layers also end with our feed-forward."""
    # Compiled without Inductor, which is slow on two cores.
    words = ["--max-num-seqs", "4", "--no-enforce-eager"]
    with launch(DEPLOYMENT.format("sole_rotation"), *words, TRITON_INTERPRET="1", VLLM_CPU_CI_ENV="1") as server:
        # The feed-forward is slow in the interpreter.
        assert _said(server, 3) == [tokens[:3] for tokens in reference_tokens]
        log = server.log_text()
    assert re.search(r"rotates in (\d+) of \1 layers", log)
    assert "in batches of up to 16 tokens" in log
    assert re.search(r"SoleRotation: \d+ tokens were rotated and written", log)
    assert "raised in" not in log
    assert "Detected eager backend" in log, "it was not compiled"


def _capacity(server):
    """KV cache capacity in tokens and in bytes, from vLLM's start-up log."""
    log = server.log_text()
    tokens = re.search(r"KV cache size: ([\d,]+) tokens", log)
    concurrency = re.search(r"Maximum concurrency for ([\d,]+) tokens per request: ([\d.]+)x", log)
    assert tokens, log[-3000:]
    assert concurrency, log[-3000:]
    return int(tokens[1].replace(",", "")), float(concurrency[2])


def test_more_requests_fit_into_the_same_memory(servers, baseline, demo_pair):
    """The baseline computes in float32: its cache takes twice the bytes of BF16."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(demo_pair.target)
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    (tokens, concurrency), (baseline_tokens, baseline_concurrency) = (
        _capacity(servers["fp8_fused"]),
        _capacity(baseline),
    )
    print(
        f"{tokens} tokens, {concurrency}x; baseline {baseline_tokens} tokens, {baseline_concurrency}x; head size {head}"
    )
    expected = row_bytes(head, 4) / row_bytes(head)
    assert math.isclose(tokens / baseline_tokens, expected, rel_tol=0.02)
    assert math.isclose(concurrency / baseline_concurrency, expected, rel_tol=0.02)
    # The capacity relative to BF16.
    assert tokens / baseline_tokens > 2 * 1.7


def test_a_cache_that_the_cpu_cannot_read_is_refused_at_once(launch):
    with (
        pytest.raises(ServerError) as caught,
        launch('[vllm]\nkv_cache_dtype = "fp8_per_token_head"\n'),
    ):
        pass
    assert "vllm-instant: --kv-cache-dtype: vLLM's attention on CPUs cannot read a KV cache of type" in caught.value.log
    assert "fp8_per_token_head and would give wrong tokens; valid: auto, fp8, fp8_e4m3, fp8_e5m2" in caught.value.log


def test_vllms_own_fp8_cache_serves_on_the_cpu(servers, baseline):
    server = servers["fp8"]
    # FP8 is not exact, but tokens with a clear margin stay the same.
    assert ask(server, PROMPT)[0]["text"][:8] == ask(baseline, PROMPT)[0]["text"][:8]
    assert httpx.get(f"{server.url}/v1/instant/deployment").json()["slots"]["attention"]["plugin"] == "fp8"
