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
from vllm_instant.tools.cli.options import CommandOptions, takes


class DistillOptions(CommandOptions):
    """What the user typed."""

    target: Annotated[str, typer.Argument(help="The target model: a folder or a Hugging Face name.")]
    output: Annotated[Path, typer.Argument(help="Folder for the draft model; an interrupted run in it is continued.")]
    text: Annotated[
        list[str] | None,
        typer.Option(help="Text to learn from: a file or folder, or CLASS=PATH to have it reported by itself."),
    ] = None
    held_out: Annotated[
        list[str] | None,
        typer.Option(help="Text to measure on, as --text; a part of each class is held out by default."),
    ] = None
    generate: Annotated[int, typer.Option(min=0, help="Number of texts that the target writes to learn from.")] = 0
    prompts: Annotated[
        Path | None,
        typer.Option(help="Prompts (JSON lines, as for bench) whose answers by the target are learned from, by class."),
    ] = None
    answer_tokens: Annotated[int, typer.Option(min=1, help="Largest length of an answer to one of --prompts.")] = 160
    objective: Annotated[
        str, typer.Option(help="Loss: kl, tv, or kl-tv (the first half of the steps kl, the second tv).")
    ] = "kl-tv"
    share: Annotated[
        float, typer.Option(min=0.0001, max=1, help="Largest size of the draft model relative to the target.")
    ] = 0.1
    layers: Annotated[
        int | None, typer.Option(min=1, help="Number of layers; a third of the target's by default, at most 4.")
    ] = None
    take_layers: Annotated[
        int | None, typer.Option(min=1, help="Start with N of the target's layers in place of a new model.")
    ] = None
    steps: Annotated[int | None, typer.Option(min=1, help="Number of training steps.")] = None
    batch: Annotated[int | None, typer.Option(min=1, help="Number of windows of text per step.")] = None
    context: Annotated[int | None, typer.Option(min=16, help="Number of tokens of a window.")] = None
    device: Annotated[str | None, typer.Option(help="Device: cpu or cuda; cuda by default where there is one.")] = None


@takes(DistillOptions)
def distill(options: DistillOptions, words: list[str]) -> None:
    """Train a small draft model on a target model's next-token distributions, and report its acceptance.

    The result is a folder that vLLM loads as a draft model. Without --text, --prompts and --generate the target writes
    256 texts of its own. Ctrl-C stops it at any time; the same command continues.
    """
    packages = {"torch": "PyTorch", "transformers": "Transformers", "accelerate": "Accelerate"}
    require("distill", packages, extra="distill")
    import torch
    import transformers

    from vllm_instant.tools.distill import distill as work
    from vllm_instant.tools.distill.training import overridden

    console = Console()
    device = _device(options)
    usual = work.TRAINING_OF_LAYERS if options.take_layers else work.DEFAULT_TRAINING
    plan = overridden(usual, steps=options.steps, batch=options.batch, context=options.context)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    model, tokenizer = _load(options.target, device)
    torch.manual_seed(plan.seed)
    draft, tokens = _draft_and_text(options, plan, model, tokenizer, console)
    total, small = model.num_parameters(), draft.num_parameters()
    console.print(
        f"target {total:,} parameters; draft {small:,} ({1 - small / total:.1%} fewer): "
        f"{draft.config.num_hidden_layers} layers of width {draft.config.hidden_size}"
    )
    _require_same_run(options, plan, draft.config.to_diff_dict())
    seconds = _train(options, plan, model, draft, tokens, device, console)
    # The rounded weights are served, so they are what is measured.
    draft.to(torch.bfloat16)
    with console.status("Measuring acceptance …"):
        acceptance = work.judge(model, draft, tokens)
    report = work.Report(
        options.target,
        total,
        small,
        draft.config.to_diff_dict(),
        options.take_layers or 0,
        options.objective,
        vars(plan),
        sum(len(c.training) for c in tokens),
        round(seconds, 1),
        acceptance,
        {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__},
    )
    draft.save_pretrained(options.output)
    tokenizer.save_pretrained(options.output)
    (options.output / work.REPORT).write_text(json.dumps(report.plain(), indent=2) + "\n")
    _print(console, report, options.output)


def _device(options: DistillOptions) -> str:
    """The device to train on; options that contradict each other end the command."""
    import torch

    from vllm_instant.tools.distill import distill as work

    if options.objective not in work.OBJECTIVES:
        fail(f"--objective must be one of {', '.join(work.OBJECTIVES)}, found {options.objective!r}")
    if options.device not in (None, "cpu", "cuda"):
        fail(f"--device must be cpu or cuda, found {options.device!r}")
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        fail("--device cuda: PyTorch sees no CUDA device here")
    if options.take_layers and options.layers:
        fail("--layers is the depth of a new model: it cannot be given with --take-layers")
    return device


def _draft_and_text(options: DistillOptions, plan: Any, model: Any, tokenizer: Any, console: Console) -> Any:
    """The draft model to train, and the tokens to train and measure it on."""
    from vllm_instant.tools.distill.text import TextError, read, tokenized

    try:
        draft = _new_draft(options, model)
        classes = read(options.text or [], options.held_out or [])
        if options.prompts:
            classes += _answered(options.prompts, options, model, tokenizer, console)
        if options.generate or not any(c.training for c in classes):
            classes.append(_written(options.generate or 256, plan, model, tokenizer, classes, console))
        return draft, tokenized(tokenizer, classes, plan.context)
    except (TextError, ValueError) as error:
        fail(str(error))


def _new_draft(options: DistillOptions, model: Any) -> Any:
    import transformers

    from vllm_instant.tools.distill import architecture
    from vllm_instant.tools.distill.initialization import layers_of

    total = model.num_parameters()
    if not options.take_layers:
        config = architecture.derive(model.config.get_text_config(), total, options.share, options.layers)
        return transformers.LlamaForCausalLM(config)
    draft = layers_of(model, options.take_layers)
    described = f"{options.take_layers} of the target's layers"
    architecture.check_share(draft.num_parameters(), total, options.share, described)
    return draft


def _answered(file: Path, options: DistillOptions, model: Any, tokenizer: Any, console: Console) -> Any:
    """The target's answers to a file of prompts; a run that is continued finds them in its folder."""
    from vllm_instant.tools.distill.answers import answered, answered_once, read_prompts

    prompts = read_prompts(file)

    def answer() -> Any:
        with _bar(console) as progress:
            task = progress.add_task("target answers", total=len(prompts))

            def tick(done: int, of: int) -> None:
                progress.update(task, completed=done)

            return answered(model, tokenizer, prompts, options.answer_tokens, tick)

    return answered_once(options.output / "answers.json", answer, prompts)


def _written(count: int, plan: Any, model: Any, tokenizer: Any, classes: Any, console: Console) -> Any:
    """Texts that the target writes."""
    from vllm_instant.tools.distill.text import generated

    with _bar(console) as progress:
        task = progress.add_task("target writes text", total=count)

        def tick(done: int, of: int) -> None:
            progress.update(task, completed=done)

        return generated(model, tokenizer, classes, count, plan.context, tick)


def _train(
    options: DistillOptions, plan: Any, model: Any, draft: Any, tokens: Any, device: str, console: Console
) -> float:
    """Train the draft model; returns the seconds that it took, those of earlier runs included."""
    from vllm_instant.tools.distill import distill as work

    with _bar(console) as progress:
        task = progress.add_task("distilling", total=plan.steps)

        def show(step: int, steps: int, loss: float) -> None:
            progress.update(task, completed=step, description=f"distilling, distance {loss:.3f}")

        try:
            return work.distill(
                model,
                draft,
                tokens,
                options.output,
                plan=plan,
                objective=options.objective,
                progress=show,
                device=device,
            )
        except KeyboardInterrupt:
            console.print("Stopped; the same command continues from the last checkpoint.")
            raise typer.Exit(130) from None


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


def _require_same_run(options: DistillOptions, plan: Any, shape: dict[str, Any]) -> None:
    """End the command where the folder holds the checkpoint of another run."""
    wanted = {"target": options.target, "shape": shape, "plan": vars(plan), "objective": options.objective}
    if options.take_layers:
        wanted["start"] = f"{options.take_layers} layers of the target"
    output = options.output
    output.mkdir(parents=True, exist_ok=True)
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
    table.add_column("accepted per step", justify="right")
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
