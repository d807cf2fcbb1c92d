"""``vllm-instant distill``: a draft model for a target, from text, in one command."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from vllm_instant.tools.cli.common import fail, require


def distill(
    target: Annotated[str, typer.Argument(help="The target model: a folder or a Hugging Face name.")],
    output: Annotated[Path, typer.Argument(help="Folder for the draft model; a stopped run in it is resumed.")],
    text: Annotated[
        list[str] | None,
        typer.Option(help="Text to learn from: a file or folder, or CLASS=PATH to have it reported by itself."),
    ] = None,
    held_out: Annotated[
        list[str] | None,
        typer.Option(help="Text to measure on, as --text; without it a part of each class is kept back."),
    ] = None,
    generate: Annotated[int, typer.Option(min=0, help="Texts that the target writes itself, to learn from.")] = 0,
    objective: Annotated[str, typer.Option(help="kl, tv, or kl-tv (the first half kl, the second tv).")] = "kl-tv",
    share: Annotated[float, typer.Option(min=0.0001, max=1, help="Largest size relative to the target.")] = 0.1,
    layers: Annotated[int | None, typer.Option(min=1, help="Depth; a third of the target's, at most 4.")] = None,
    take_layers: Annotated[
        int | None, typer.Option(min=1, help="Start as the target with N of its layers, not as a new model.")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Training steps.")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Windows of text in a step.")] = None,
    context: Annotated[int | None, typer.Option(min=16, help="Tokens of a window.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; cuda where there is one.")] = None,
) -> None:
    """Train a small draft model on a target model's next-token distributions, and report what is accepted of it.

    The result is a folder that vLLM loads as a draft model. Without --text and --generate the target writes 256 texts
    of its own. Stop it with Ctrl-C at any time; the same command goes on.
    """
    require(
        "distill",
        {"torch": "PyTorch", "transformers": "Transformers", "accelerate": "Accelerate"},
        extra="distill",
    )
    import torch
    import transformers

    from vllm_instant.tools.distill import architecture
    from vllm_instant.tools.distill import distill as work
    from vllm_instant.tools.distill.initialization import layers_of
    from vllm_instant.tools.distill.text import TextError, generated, read, tokenized
    from vllm_instant.tools.distill.training import overridden

    console = Console()
    if objective not in work.OBJECTIVES:
        fail(f"--objective must be one of {', '.join(work.OBJECTIVES)}, found {objective!r}")
    if device not in (None, "cpu", "cuda"):
        fail(f"--device must be cpu or cuda, found {device!r}")
    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if where == "cuda" and not torch.cuda.is_available():
        fail("--device cuda: PyTorch sees no CUDA device here")
    if take_layers and layers:
        fail("--layers is the depth of a new model: it cannot be given with --take-layers")
    usual = work.TRAINING_OF_LAYERS if take_layers else work.DEFAULT_TRAINING
    plan = overridden(usual, steps=steps, batch=batch, context=context)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    model, tokenizer = _load(target, where)
    total = model.num_parameters()
    torch.manual_seed(plan.seed)
    try:
        if take_layers:
            draft = layers_of(model, take_layers)
            architecture.check_share(draft.num_parameters(), total, share, f"{take_layers} of the target's layers")
        else:
            draft = transformers.LlamaForCausalLM(
                architecture.derive(model.config.get_text_config(), total, share, layers)
            )
        classes = read(text or [], held_out or [])
        if generate or not any(c.training for c in classes):
            with _bar(console) as progress:
                task = progress.add_task("target writes text", total=generate or 256)
                classes.append(
                    generated(
                        model,
                        tokenizer,
                        classes,
                        generate or 256,
                        plan.context,
                        lambda done, count: progress.update(task, completed=done),
                    )
                )
        tokens = tokenized(tokenizer, classes, plan.context)
    except (TextError, ValueError) as error:
        fail(str(error))
    shape, small = draft.config, draft.num_parameters()
    console.print(
        f"target {total:,} parameters; draft {small:,} ({1 - small / total:.1%} fewer): "
        f"{shape.num_hidden_layers} layers of width {shape.hidden_size}"
    )
    output.mkdir(parents=True, exist_ok=True)
    run = {"target": target, "shape": shape.to_diff_dict(), "plan": vars(plan), "objective": objective}
    _same_run(output, run | ({"start": f"{take_layers} layers of the target"} if take_layers else {}))
    with _bar(console) as progress:
        task = progress.add_task("distilling", total=plan.steps)

        def show(step: int, steps: int, loss: float) -> None:
            progress.update(task, completed=step, description=f"distilling, distance {loss:.3f}")

        try:
            seconds = work.distill(
                model, draft, tokens, output, plan=plan, objective=objective, progress=show, device=where
            )
        except KeyboardInterrupt:
            console.print("Stopped; the same command goes on from the last checkpoint.")
            raise typer.Exit(130) from None
    # What is measured is what is served: the rounded weights.
    draft.to(torch.bfloat16)
    with console.status("Measuring acceptance …"):
        found = work.judge(model, draft, tokens)
    report = work.Report(
        target,
        total,
        small,
        shape.to_diff_dict(),
        take_layers or 0,
        objective,
        vars(plan),
        sum(len(c.training) for c in tokens),
        round(seconds, 1),
        found,
        {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__},
    )
    draft.save_pretrained(output)
    tokenizer.save_pretrained(output)
    (output / work.REPORT).write_text(json.dumps(report.plain(), indent=2) + "\n")
    _print(console, report, output)


def _load(name: str, device: str) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16)
    except (OSError, ValueError, KeyError) as error:
        fail(f"{name} cannot be loaded: {str(error).splitlines()[0]}")
    except Exception as error:  # safetensors and pickle raise their own kinds for damaged files
        fail(f"{name} cannot be loaded: {type(error).__name__}: {str(error).splitlines()[0]}")
    return model.to(device).eval(), tokenizer


def _same_run(output: Path, wanted: dict[str, Any]) -> None:
    """A checkpoint of another run must not be taken for one of this."""
    path = output / "run.json"
    wanted = json.loads(json.dumps(wanted))
    if path.exists():
        found = json.loads(path.read_text())
        different = sorted(key for key in wanted if found.get(key) != wanted[key])
        if different:
            fail(f"{output} holds a run with another {', '.join(different)}; choose another folder, or delete it")
    path.write_text(json.dumps(wanted, indent=2) + "\n")


def _bar(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return Progress(*columns, TimeElapsedColumn(), TextColumn("ETA"), TimeRemainingColumn(), console=console)


def _print(console: Console, report: Any, output: Path) -> None:
    table = Table(title="Accepted of the draft tokens, by position (each given those before it)")
    positions = len(report.acceptance[0].by_position) if report.acceptance else 0
    table.add_column("held-out text")
    table.add_column("temperature", justify="right")
    for position in range(1, positions + 1):
        table.add_column(str(position), justify="right")
    table.add_column("accepted a step", justify="right")
    for row in report.acceptance:
        shares = [f"{share:.0%}" for share in row.by_position]
        table.add_row(row.text, f"{row.temperature:g}", *shares, f"{row.mean_length:.2f}")
    console.print(table)
    console.print(
        f"{report.draft_parameters:,} parameters, {report.seconds:.0f} s of training; report in "
        f"{output / 'distillation.json'}"
    )
    console.print("Serve with it:", style="bold")
    console.print(
        f'[vllm]\nspeculative_config = {{ method = "draft_model", model = {json.dumps(str(output))}, '
        'num_speculative_tokens = 8, draft_sample_method = "probabilistic" }',
        markup=False,
        soft_wrap=True,
    )
