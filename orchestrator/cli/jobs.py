"""Commands for builds that run on a Ray cluster without this machine: submit, status, logs, stop, list."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from orchestrator.cli import following
from orchestrator.cli.console import Json, SpecFile, StoreUrl, exit_codes, out, place_of, plain, show, show_facts

if TYPE_CHECKING:
    from collections.abc import Iterator

    from actors import Client, RaySubmission
    from actors.job_api import Job

app = typer.Typer()

Address = Annotated[
    str | None,
    typer.Option("--address", help="http://HOST:8265, the head's dashboard; absent: RAY_API_SERVER_ADDRESS or RAY_ADDRESS."),
]
JobId = Annotated[str, typer.Argument(metavar="ID", help="Id that `submit` or `list` printed.")]
StartSeconds = Annotated[float, typer.Option("--start-seconds", min=1, help="Longest wait of the job for a node.")]
_START_SECONDS = 900.0


@app.command()
def submit(
    spec: SpecFile,
    cluster: Annotated[Path, typer.Option("--cluster", help="Cluster file, YAML, of kind ray.")],
    address: Address = None,
    store: StoreUrl = None,
    follow: Annotated[
        bool, typer.Option("--follow", help="Show the build and end with its exit code; Ctrl-C only detaches.")
    ] = False,
    start_seconds: StartSeconds = _START_SECONDS,
    as_json: Json = False,
) -> None:
    """Submit a build to a Ray cluster. Submitting the same build again attaches to its job, or resumes a failed one."""
    with exit_codes(as_json):
        from orchestrator.spec.loading import load_spec

        wanted, place = load_spec(spec), place_of(cluster, store)
        client = _client(address)
        submission = client.submit(wanted, place, start_seconds=start_seconds)
        _announce(client, submission, as_json)
        if follow:
            _follow(client, submission, as_json)


@app.command()
def status(job_id: JobId, address: Address = None, as_json: Json = False) -> None:
    """Print the state of a submitted build."""
    with exit_codes(as_json):
        job = _client(address).attach(job_id).status()
        show_facts(_facts(job), as_json)


@app.command()
def logs(
    job_id: JobId,
    address: Address = None,
    follow: Annotated[bool, typer.Option("--follow", help="Follow until the build ends, then exit with its code.")] = False,
) -> None:
    """Print the output of a submitted build's driver: JSON lines."""
    with exit_codes():
        client = _client(address)
        submission = client.attach(job_id)
        if not follow:
            print(submission.logs(), end="")
            return
        _follow(client, submission, as_json=False, lines=submission.lines())


@app.command()
def stop(job_id: JobId, address: Address = None, as_json: Json = False) -> None:
    """Stop a submitted build cleanly. Committed steps stay; a new submission resumes from them."""
    with exit_codes(as_json):
        submission = _client(address).attach(job_id)
        if not as_json:
            out.print(f"stopping {job_id}")
        job = submission.cancel()
        if as_json:
            show_facts(_facts(job), as_json)
        elif job.ended:
            out.print(f"{job_id}: {job.state}")
        else:
            out.print(f"{job_id} is still {job.state}; a pending job ends as soon as it is started")


@app.command("list")
def list_(address: Address = None, as_json: Json = False) -> None:
    """List the builds submitted to a cluster, oldest first."""
    with exit_codes(as_json):
        from rich.table import Table

        facts = [_facts(job) for job in _client(address).list()]
        table = Table("id", "state", "submitted", "release", "exit code", box=None, pad_edge=False)
        for fact in facts:
            code = "" if fact["exit_code"] is None else str(fact["exit_code"])
            table.add_row(fact["id"], fact["state"], fact["submitted"], fact["release"], code)
        show({"jobs": facts}, [table], as_json)


def _client(address: str | None) -> Client:
    from actors import Client

    return Client(address)


def _facts(job: Job) -> dict[str, Any]:
    """Return the facts of a job, for people and machines."""
    message = job.message.strip().splitlines()
    return {
        "id": job.id,
        "state": job.state,
        "submitted": _time(job.submitted_at),
        "ended": _time(job.ended_at),
        "exit_code": job.build_exit_code,
        "release": job.metadata.get("release", ""),
        "manifest": job.metadata.get("manifest", "") if job.state == "SUCCEEDED" else "",
        "node": job.node,
        "message": f"the driver was ended by {job.end_signal}" if job.end_signal else message[0] if message else "",
    }


def _time(seconds: float | None) -> str:
    return datetime.datetime.fromtimestamp(seconds).astimezone().isoformat(timespec="seconds") if seconds else ""


def _announce(client: Client, submission: RaySubmission, as_json: bool) -> None:
    if as_json:
        facts = {"id": submission.id, "address": client.address, "attached": submission.attached, "warnings": submission.warnings}
        print(json.dumps({"event": "submitted", **facts}), flush=True)
        return
    for warning in submission.warnings:
        out.print(f"[yellow]warning:[/] {plain(warning)}", soft_wrap=True)
    out.print(f"{submission.id} {'was submitted before: attached to it' if submission.attached else 'submitted'}", soft_wrap=True)


def _follow(client: Client, submission: RaySubmission, as_json: bool, lines: Iterator[str] | None = None) -> None:
    where = f"--address {client.address}"
    commands = [f"orchestrator logs {submission.id} --follow {where}", f"orchestrator stop {submission.id} {where}"]
    following.show_build(submission, as_json, submission.id, commands, lines)
