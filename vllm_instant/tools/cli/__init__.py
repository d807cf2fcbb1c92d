"""The ``vllm-instant`` command."""

from __future__ import annotations

import typer

from vllm_instant.tools.cli import (
    bench,
    calibrate,
    config,
    demo,
    distill,
    doctor,
    draft_server,
    escalation,
    experts,
    explain,
    loadtest,
    new_plugin,
    plugins,
    try_drafter,
    verify,
)

app = typer.Typer(
    name="vllm-instant",
    help="Deployment files, plugins and checks for vLLM servers that run with --plugins vllm_instant.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.add_typer(config.app, name="config")
app.add_typer(demo.app, name="demo")
app.add_typer(escalation.app, name="escalation")
app.add_typer(experts.app, name="experts")
app.add_typer(loadtest.app, name="loadtest")
app.command(name="plugins")(plugins.list_plugins)
app.command(name="new-plugin")(new_plugin.new_plugin)
app.command(name="try-drafter")(try_drafter.try_drafter)
app.command(name="doctor")(doctor.doctor)
app.command(name="draft-server")(draft_server.draft_server)
app.command(name="distill")(distill.distill)
app.command(name="explain")(explain.explain)
app.command(name="calibrate", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(
    calibrate.calibrate
)
app.command(name="verify", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(
    verify.verify_deployments
)
app.command(name="bench", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(bench.bench)
