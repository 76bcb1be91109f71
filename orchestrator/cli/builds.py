"""Commands build, convert, quantize, build-engine, inspect, compare and schema. The only importer of actors."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from pydantic import BaseModel
from rich.table import Table

from orchestrator.base.errors import SpecError
from orchestrator.cli.console import (
    ClusterFile,
    Json,
    PublicKey,
    Ranks,
    SpecFile,
    StoreUrl,
    exit_codes,
    out,
    parse_ranks,
    place_of,
    plain,
    show,
)
from orchestrator.cli.stopping import kept
from orchestrator.spec.build import BuildConfig, BuildSpec
from orchestrator.spec.cluster import ClusterSpec
from orchestrator.spec.decoding import decode
from orchestrator.spec.rates import RatesSpec

if TYPE_CHECKING:
    from orchestrator.building import Build
    from orchestrator.events import Listener
    from orchestrator.quantizing import SweepRow
    from orchestrator.scheduling.cluster import Cluster

app = typer.Typer()
checkpoint_app = typer.Typer(no_args_is_help=True, help="Work with checkpoints.")
app.add_typer(checkpoint_app, name="checkpoint")


@contextlib.contextmanager
def _listening(as_json: bool, cluster_spec: ClusterSpec | None = None) -> Iterator[Listener]:
    """Show a build as JSON lines or to people. With a `cluster_spec` of kind ray, count its metrics for Ray's export too."""
    from orchestrator.events import print_line, to_all
    from orchestrator.report import LiveView

    with contextlib.ExitStack() as stack:
        listeners = [print_line if as_json else stack.enter_context(LiveView(out)).on]
        if cluster_spec is not None and cluster_spec.kind == "ray":
            from actors.metrics import Metrics

            listeners.append(Metrics().tell)
        yield to_all(*listeners)


def _open_cluster(cluster_spec: ClusterSpec) -> Cluster:
    if cluster_spec.kind == "ray":
        from actors import RayCluster

        with kept():
            return RayCluster(cluster_spec)
    if cluster_spec.kind == "mpi":
        from orchestrator.clusters.mpi import MpiCluster

        return MpiCluster(cluster_spec)
    from orchestrator.clusters.local import LocalCluster

    return LocalCluster(cluster_spec)


@app.command()
def build(
    spec: SpecFile,
    cluster: ClusterFile = None,
    store: StoreUrl = None,
    sign_key: Annotated[Path | None, typer.Option("--sign-key", help="Private key (PEM, P-256) to sign the release with.")] = None,
    report: Annotated[
        Path | None, typer.Option("--report", help="File for the HTML report; without it, a failed build leaves none.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Build, verify and publish engines. After an interruption, run it again: committed steps are not repeated."""
    with exit_codes(as_json):
        from orchestrator import building
        from orchestrator.spec.loading import load_spec

        wanted = load_spec(spec)
        cluster_spec = place_of(cluster, store)
        with _listening(as_json, cluster_spec) as listener:
            made = building.build(
                wanted, cluster_spec, open_cluster=_open_cluster, listener=listener, sign_key=sign_key, report=report
            )
        if not as_json:
            _report_build(made)


def _report_build(made: Build) -> None:
    manifest = made.manifest
    if manifest.miniature:
        out.print(manifest.miniature.line())
    if manifest.verification:
        out.print(f"verified on {manifest.verification.line()}")
    else:
        out.print("[yellow]verification is switched off in the spec[/]")
    from orchestrator.report import format_bytes, format_count

    engines = [file for record in manifest.ranks for file in record.files]
    out.print(f"{format_count(len(engines), 'engine')}, {format_bytes(sum(file.num_bytes for file in engines))}")
    out.print(f"published: {made.address}/manifest.json", soft_wrap=True)


@app.command()
def inspect(
    url: Annotated[str, typer.Argument(help="URL or folder of a release or a checkpoint.")],
    public_key: PublicKey = None,
    as_json: Json = False,
) -> None:
    """Print a release or a checkpoint as a table."""
    with exit_codes(as_json):
        from orchestrator.cli import inspection

        facts, tables = inspection.inspect(url, public_key)
        show(facts, tables, as_json)


@app.command()
def convert(
    source: Annotated[str, typer.Option("--source", help="Folder or URL of the checkpoint.")],
    output: Annotated[Path, typer.Option("--output", help="Folder for the TensorRT-LLM checkpoint.")],
    tp: Annotated[int, typer.Option("--tp", help="Tensor-parallel size.")] = 1,
    pp: Annotated[int, typer.Option("--pp", help="Pipeline-parallel size.")] = 1,
    cp: Annotated[int, typer.Option("--cp", help="Context-parallel size; these ranks share files.")] = 1,
    dtype: Annotated[str, typer.Option("--dtype", help="auto, float16, bfloat16 or float32.")] = "auto",
    max_shard_bytes: Annotated[str, typer.Option("--max-shard-bytes", help="Largest shard; larger ranks are split.")] = "5GB",
    embedding_dim: Annotated[
        int | None, typer.Option("--split-embedding", help="Split the embedding over ranks: 0 by vocabulary, 1 by hidden size.")
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Compare every rank with the Hugging Face model before the checkpoint is written.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Convert a checkpoint to TensorRT-LLM's format, like convert_checkpoint.py."""
    with exit_codes(as_json):
        from orchestrator import stages
        from orchestrator.spec.loading import resolve_source

        spec = decode(
            BuildSpec,
            {
                "source": {"path": resolve_source(source, Path.cwd())},
                "dtype": dtype,
                "topology": {"tp": tp, "pp": pp, "cp": cp},
                "conversion": {"max_shard_bytes": max_shard_bytes, **_embedding(embedding_dim)},
                "engine": {"max_input_len": 1},
                "release": {"name": "checkpoint", "version": "0"},
            },
            "command line",
        )
        from orchestrator.report import format_count

        with _listening(as_json) as listener:
            converted = stages.convert(spec, output, listener, verify=verify)
        made = converted.plan
        if not as_json:
            shared = f" in {made.topology.num_files} files" if made.topology.cp > 1 else ""
            out.print(f"{format_count(made.topology.world_size, 'rank')}{shared} in {output}")
            if converted.verification is not None:
                out.print(f"verified on {converted.verification.line()}")


def _embedding(dim: int | None) -> dict[str, Any]:
    return {} if dim is None else {"use_parallel_embedding": True, "embedding_sharding_dim": dim}


@app.command()
def quantize(
    spec: SpecFile,
    cluster: ClusterFile = None,
    store: StoreUrl = None,
    sweep: Annotated[str, typer.Option(help="Algorithms to compare, e.g. FP8,W4A16_AWQ, or all; none: unquantized.")] = "",
    auto: Annotated[float, typer.Option(help="Average bits per weight: search a format per layer.")] = 0.0,
    formats: Annotated[str, typer.Option(help="Candidate formats of --auto.")] = "FP8,W4A16_AWQ",
    output: Annotated[
        Path | None, typer.Option(help="Folder for the calibration artifact; with --auto, path of quant_cfg.json.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Calibrate only, compare algorithms, or search formats per layer."""
    with exit_codes(as_json):
        from orchestrator import quantizing as sweeping
        from orchestrator.spec.loading import load_spec

        wanted = load_spec(spec)
        if auto:
            target = output or Path("quant_cfg.json")
            chosen = sweeping.choose(wanted, formats.split(","), auto, target)
            counts = {
                name: sum(fmt is not None and fmt.algorithm == name for fmt in chosen.values()) for name in formats.split(",")
            }
            counts["unquantized"] = sum(fmt is None for fmt in chosen.values())
            facts: dict[str, Any] = {"quant_cfg": str(target), "linears": counts}
            show(facts, [], as_json)
            if not as_json:
                out.print(f"{target}: " + ", ".join(f"{count} linears {name}" for name, count in counts.items()))
        elif sweep:
            algorithms = sweeping.all_algorithms() if sweep == "all" else sweep.split(",")
            cluster_spec = place_of(cluster, store)
            with _listening(as_json) as listener:
                rows = sweeping.sweep(wanted, algorithms, cluster_spec, open_cluster=_open_cluster, listener=listener)
            show({"rows": [row.facts() for row in rows]}, [_sweep_table(rows)], as_json)
        else:
            if output is None:
                raise SpecError("--output is missing", "Name a folder for the calibration artifact, or compare with --sweep.")
            cluster_spec = place_of(cluster, store)
            with _listening(as_json) as listener:
                written = sweeping.calibrate(wanted, output, cluster_spec, open_cluster=_open_cluster, listener=listener)
            show({"files": [str(path) for path in written]}, [], as_json)
            if not as_json:
                out.print(f"{', '.join(path.name for path in written)} in {output}", soft_wrap=True)


def _sweep_table(rows: Sequence[SweepRow]) -> Table:
    """Return a table of algorithms: size, distance from the unquantized model, the worst linear."""
    from orchestrator.report import format_bytes

    table = Table("algorithm", "checkpoint", "perplexity", "KL", "top-1", "worst linear", "its error", box=None, pad_edge=False)
    for row in rows:
        found = row.verification
        table.add_row(
            row.algorithm,
            format_bytes(row.checkpoint_bytes),
            "" if found.perplexity_ratio is None else f"x {found.perplexity_ratio:.3f}",
            f"{found.mean_kl:.2e}",
            f"{found.top1_agreement:.3f}",
            row.worst_linear,
            f"{row.worst_error:.3f}" if row.worst_linear else "",
        )
    return table


@app.command("build-engine")
def build_engine(
    checkpoint: Annotated[Path, typer.Option("--checkpoint", help="TensorRT-LLM checkpoint folder.")],
    output: Annotated[Path, typer.Option("--output", help="Folder for the engines.")],
    rank: Ranks = "all",
    backend: Annotated[Literal["tensorrt", "tensorrt_rtx"], typer.Option("--backend")] = "tensorrt_rtx",
    max_batch_size: Annotated[int, typer.Option("--max-batch-size")] = 8,
    max_input_len: Annotated[int, typer.Option("--max-input-len")] = 1024,
    max_seq_len: Annotated[int | None, typer.Option("--max-seq-len", help="KV cache slots; absent: the model's positions.")] = None,
    gather_logits: Annotated[
        bool, typer.Option("--gather-logits/--local-logits", help="Logits of the whole vocabulary on every rank.")
    ] = True,
) -> None:
    """Compile ranks of a checkpoint, like trtllm-build. Neither verifies nor publishes: `build` does both."""
    with exit_codes():
        from orchestrator import stages
        from orchestrator.report import format_bytes

        fields = {
            "backend": backend, "max_batch_size": max_batch_size, "max_input_len": max_input_len,
            "max_seq_len": max_seq_len, "gather_logits": gather_logits,
        }  # fmt: skip
        engine = decode(BuildConfig, fields, "command line")
        with out.status("compiling") as status:
            ranks = stages.build_engine(
                checkpoint, parse_ranks(rank), output, engine,
                lambda number, phase, done, total: status.update(f"rank {number}: {phase} {done}/{total}"),
            )  # fmt: skip
        for number in ranks:
            path = output / f"rank{number}.engine"
            out.print(f"{path}  {format_bytes(path.stat().st_size)}")


@checkpoint_app.command()
def compare(
    a: Annotated[str, typer.Argument(metavar="A", help="Folder or URL of a checkpoint, in any source format.")],
    b: Annotated[str, typer.Argument(metavar="B", help="The other checkpoint, in any source format.")],
    tolerance: Annotated[
        float | None,
        typer.Option("--tolerance", min=0, help="Largest relative difference to accept; absent: equal to the bit."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Compare two checkpoints tensor by tensor. Exit code 0: same; 1: different."""
    with exit_codes(as_json):
        from orchestrator.checkpoints import compare
        from orchestrator.spec.loading import resolve_source

        found = compare.compare(resolve_source(a, Path.cwd()), resolve_source(b, Path.cwd()), tolerance)
        if as_json:
            print(json.dumps(found.to_plain(), indent=1))
        else:
            for line in found.lines():
                out.print(plain(line), soft_wrap=True)
    if not found.same:
        raise typer.Exit(1)


@app.command()
def schema(what: Annotated[Literal["build", "cluster", "rates", "manifest"], typer.Argument(help="Kind of file.")]) -> None:
    """Print the JSON Schema of a build spec, a cluster file, a rates file or a manifest."""
    from orchestrator.releases.manifest import manifest_schema

    models: dict[str, type[BaseModel]] = {"build": BuildSpec, "cluster": ClusterSpec, "rates": RatesSpec}
    print(json.dumps(models[what].model_json_schema() if what in models else manifest_schema(), indent=1))
