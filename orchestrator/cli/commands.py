"""All commands of the command line."""

from __future__ import annotations

import typer

from orchestrator.cli import builds, families, following, jobs, kubernetes, options, plans, releases, run

app = typer.Typer(cls=options.Root, no_args_is_help=True, context_settings=options.SETTINGS, pretty_exceptions_enable=False)
app.callback()(options.root)
app.add_typer(plans.app)
app.add_typer(builds.app)
app.add_typer(jobs.app)
app.add_typer(releases.app)
app.add_typer(run.app)
app.add_typer(following.app)
app.add_typer(kubernetes.app, name="k8s")
app.add_typer(families.app, name="family")
