"""``vllm-instant experts trace``: records the experts that a model uses."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from vllm_instant.tools.cli.common import fail, require_vllm
from vllm_instant.tools.measure.http_client import base_url, get
from vllm_instant.tools.measure.servers import Server, ServerError, terminable


def trace(
    context: typer.Context,
    model: Annotated[
        str, typer.Argument(help="The model, as for `vllm serve`, or the address of a server that records already.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="File to write.")] = Path("experts.npz"),
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="File of JSON lines with prompt and class, or of one prompt per line; built-in classes by default."
        ),
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Number of tokens to record.")] = 20_000,
    concurrency: Annotated[int, typer.Option(min=1, help="Number of concurrent requests.")] = 8,
    output_tokens: Annotated[int, typer.Option(min=1, help="Maximum number of tokens of an answer.")] = 96,
) -> None:
    """Serve a mixture-of-experts model under prompts and record which experts it picks, into one file.

    Further words are passed to `vllm serve`. With a URL, prompts go to a server whose experts plugin is `observed`; it
    writes the trace that its deployment names.
    """
    from vllm_instant.tools.moe.tracing import TracingError, built_in_prompts, read_prompts, record

    console = Console()
    attached = model.startswith(("http://", "https://"))
    if not attached:
        require_vllm("experts trace")
    try:
        texts = built_in_prompts() if prompts is None else read_prompts(prompts)
        with terminable(), tempfile.TemporaryDirectory(prefix="vllm-instant-trace-") as folder:
            server = None
            try:
                if attached:
                    url = base_url(model)
                    name = str(get(url, "/v1/models").json()["data"][0]["id"])
                else:
                    server = Server(
                        model,
                        [*context.args, *_recording(output, tokens)],
                        log=Path(folder) / "server.log",
                        environment={"INSTANT_CONFIG": None},
                    )
                    with console.status(f"Starting {model} …"):
                        server.launch()
                        server.wait()
                    url, name = server.url, server.served_model()
                with console.status("Recording …") as status:
                    path, recorded = record(
                        url,
                        name,
                        texts,
                        tokens,
                        concurrency=concurrency,
                        output_tokens=output_tokens,
                        progress=lambda count: status.update(f"{count} of {tokens} tokens …"),
                    )
            finally:
                if server is not None:
                    server.stop()
    except (TracingError, OSError) as error:
        fail(str(error))
    except ServerError as error:
        print(f"vllm-instant: {error}", file=sys.stderr)
        raise typer.Exit(1) from None
    console.print(f"{recorded} tokens in {path}")


def _recording(output: Path, tokens: int) -> list[str]:
    settings = {
        "experts.plugin": "observed",
        "experts.adjustable": "true",
        "experts.trace": str(output.resolve()),
        "experts.tokens": str(tokens),
        "speculation.plugin": "off",
    }
    return ["--plugins", "vllm_instant", *(f"--instant-set={key}={value}" for key, value in settings.items())]
