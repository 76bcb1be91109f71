"""Forms of a mixture's experts at a real layer's widths: dense and gathered, side by side.

    python -m benchmarks.experts [--folder DIR] [--tokens 512] [--threads 2] [--without-engines]

One layer of Qwen3-30B-A3B (hidden 2048, 128 experts of 768, 8 chosen), and the same with 64 experts, 4 chosen. Both are converted
and verified in either form; their portable graphs run in ONNX Runtime on this CPU by turns, and TensorRT-RTX builds their engines.
Last, engines of an experts' linear alone, one of which holds both forms in an `If`.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from rich.console import Console
from rich.table import Table

from orchestrator.engines import EngineRequest, Profile, backend
from orchestrator.model.stage import ExpertForm, StageOptions
from orchestrator.networks.graph import GraphWriter
from orchestrator.planning import preparation
from orchestrator.planning.plan import Plan
from orchestrator.planning.steps import Kind
from orchestrator.releases.genai import SESSION_ENTRIES
from orchestrator.spec.build import BuildConfig, BuildSpec
from orchestrator.spec.decoding import decode
from tests.integration.steps import run_steps
from tests.support.families import write_tiny
from tests.support.portable import portable_folder

LAYER: dict[str, Any] = {
    "hidden_size": 2048, "moe_intermediate_size": 768, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
    "num_hidden_layers": 1, "max_position_embeddings": 1024,
}  # fmt: skip
SIZES = {"128 experts, 8 chosen": (128, 8), "64 experts, 4 chosen": (64, 4)}
FORMS: tuple[ExpertForm, ...] = ("dense", "gathered")
_SLOTS = 1024


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path(".cache/experts"))
    parser.add_argument("--tokens", type=int, default=512, help="Tokens of the prefill.")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--without-engines", action="store_true")
    arguments = parser.parse_args()
    console = Console(width=140)
    for size, (experts, chosen) in SIZES.items():
        source = arguments.folder / f"{experts}-{chosen}"
        if not (source / "config.json").is_file():
            write_tiny("qwen3_moe", source, num_experts=experts, num_experts_per_tok=chosen, **LAYER)
        plans = {form: plan(source, form) for form in FORMS}
        console.print(executed(size, plans, arguments.folder, arguments.tokens, arguments.threads))
        if not arguments.without_engines:
            console.print(compiled(plans, arguments.folder))


def plan(source: Path, form: ExpertForm) -> Plan:
    """The plan of a build with a portable part."""
    plain = {
        "source": {"path": str(source.resolve())}, "release": {"name": "none", "version": "0", "include": ["engines", "portable"]},
        "engine": {"max_batch_size": 1, "max_input_len": 512, "max_seq_len": _SLOTS, "experts": form},
        "verification": {"max_tokens": 12, "decode_steps": 3},
    }  # fmt: skip
    return preparation.plan(decode(BuildSpec, plain, "benchmark"))


def executed(size: str, plans: dict[ExpertForm, Plan], folder: Path, tokens: int, threads: int) -> Table:
    """Time one decode step and one prefill of the portable graphs, by turns."""
    errors, sessions = {}, {}
    for form, made in plans.items():
        laid_out = folder / "model" / size.replace(" ", "-") / form
        if not laid_out.is_dir():
            portable_folder(made, (folder / "store").resolve(), laid_out)
        outcomes = run_steps(made, (folder / "store").resolve().as_uri(), (Kind.REFERENCE, Kind.CONVERT, Kind.VERIFY))
        errors[form] = list(outcomes.values())[-1].facts.verification.max_relative_error
        sessions[form] = opened(laid_out / "stage0.onnx", threads)
    calls: dict[str, Callable[[Any], object]] = {
        "decode of 1 token": lambda session: session.run(None, feeds(1, 100)),
        f"prefill of {tokens}": lambda session: session.run(None, feeds(tokens, 0)),
    }
    times = {name: by_turns(sessions, call, 25 if "decode" in name else 3) for name, call in calls.items()}
    reads = plans["dense"].decode_reads()[0]
    table = Table("form", *times, "weights read by a decode step", "relative error", box=None, title=size)
    for form, weights in (("dense", reads.dense), ("gathered", reads.gathered)):
        cells = (f"{1e3 * found[form]:.1f} ms" for found in times.values())
        table.add_row(form, *cells, f"{weights / 1e6:.1f} MB", f"{errors[form]:.1e}")
    ratios = (f"{found['dense'] / found['gathered']:.2f}" for found in times.values())
    table.add_row("dense / gathered", *ratios, f"{reads.dense / reads.gathered:.2f}")
    return table


def opened(path: Path, threads: int) -> Any:
    """A session of a stage's portable graph, as genai_config.json asks for it, whose threads do not spin between its calls.

    They would take the cores from the session of the other form, whose turn is next.
    """
    options = onnxruntime.SessionOptions()
    for name, value in {**SESSION_ENTRIES, "session.intra_op.allow_spinning": "0"}.items():
        options.add_session_config_entry(name, value)
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def feeds(tokens: int, position: int) -> dict[str, Any]:
    """The inputs of a call whose first token is at `position`."""
    rng = np.random.default_rng(5)
    cache = np.zeros((1, LAYER["num_key_value_heads"], _SLOTS, LAYER["head_dim"]), np.float32)
    return {
        "input_ids": rng.integers(3, 131, (1, tokens)),
        "position_ids": np.arange(position, position + tokens)[None],
        "past_key_values.0.key": cache, "past_key_values.0.value": cache,
    }  # fmt: skip


def by_turns(sessions: dict[ExpertForm, Any], call: Callable[[Any], object], count: int) -> dict[ExpertForm, float]:
    """The median seconds of each session's calls, one after the other."""
    found: dict[ExpertForm, list[float]] = {form: [] for form in sessions}
    for number in range(count + 1):
        for form, session in sessions.items():
            begun = time.perf_counter()
            call(session)
            if number:  # the first call is not counted
                found[form].append(time.perf_counter() - begun)
    return {form: statistics.median(times) for form, times in found.items()}


def compiled(plans: dict[ExpertForm, Plan], folder: Path) -> Table:
    """Build the engine of each form, and those of the first linear alone, one with both forms in an `If`."""
    table = Table("engine", "seconds", "bytes", box=None)
    for form, made in plans.items():
        store = (folder / f"engines-{time.time_ns()}").resolve()
        run_steps(made, store.as_uri(), (Kind.CONVERT,))
        begun = time.perf_counter()
        built = list(run_steps(made, store.as_uri(), (Kind.CONVERT, Kind.BUILD)).values())[-1]
        size = sum(output.num_bytes for output in built.outputs)
        table.add_row(form, f"{time.perf_counter() - begun:.1f}", f"{size:,}")
        shutil.rmtree(store)
    stage = plans["dense"].inputs.network(plans["dense"].topology, 0).stage
    for name, model in linears(stage).items():
        begun = time.perf_counter()
        size = engine_bytes(model)
        table.add_row(f"first linear alone: {name}", f"{time.perf_counter() - begun:.1f}", f"{size:,}")
    return table


def linears(stage: StageOptions) -> dict[str, onnx.ModelProto]:
    """The first linear of a layer's experts, summed over them: of all, of those in a list, and both in an `If`."""
    config = stage.config
    assert config.moe is not None
    size = (config.moe.num_experts, 2 * config.expert_size, config.hidden_size)

    def branch(graph: GraphWriter, form: ExpertForm) -> str:
        weight = graph.external("weight", config.dtype, size)
        chosen = weight if form == "dense" else graph.node("Gather", [weight, "list"], f"{form}.chosen", axis=0)
        turned = graph.node("Transpose", [chosen], f"{form}.turned", perm=[0, 2, 1])
        product = graph.node("MatMul", ["x4", turned], f"{form}.product")
        return graph.node("ReduceSum", [product, graph.constant("axis_1", [1])], f"{form}.sum", keepdims=0)

    def written(name: str, forms: tuple[ExpertForm, ...]) -> onnx.ModelProto:
        graph = GraphWriter(name)
        graph.input("x", config.dtype, ["batch", "tokens", size[2]])
        graph.input("list", "int64", ["listed"])
        graph.node("Unsqueeze", ["x", graph.constant("axis_1", [1])], "x4")
        if len(forms) == 1:
            graph.output(branch(graph, forms[0]), config.dtype, ["batch", "tokens", size[1]])
            return graph.model()
        branches = []
        for form in forms:
            inner = GraphWriter(form)
            inner.output(branch(inner, form), config.dtype, ["batch", "tokens", size[1]])
            made = inner.model().graph
            graph.take(initializers=made.initializer)
            del made.initializer[:]
            branches.append(made)
        length = graph.node("Shape", ["list"], "length")
        few = graph.node("Less", [length, graph.constant("experts", [size[0]])], "few")
        graph.node("If", [graph.node("Squeeze", [few], "is_few")], "y", then_branch=branches[1], else_branch=branches[0])
        graph.output("y", config.dtype, ["batch", "tokens", size[1]])
        return graph.model()

    return {
        "all experts": written("all", FORMS[:1]),
        "a list of them": written("list", FORMS[1:]),
        "an If of both": written("if", FORMS),
    }


def engine_bytes(model: onnx.ModelProto) -> int:
    """The size of the engine of a model, whose weights all have the same bits."""
    sizes: list[int] = []
    (weight,) = (tensor for tensor in model.graph.initializer if tensor.data_location == onnx.TensorProto.EXTERNAL)
    experts, _, hidden = weight.dims
    ranges = (512, experts), (1, experts // 2)
    profiles = tuple(
        Profile(
            str(tokens), {"x": ((1, 1, hidden), (1, tokens, hidden), (1, tokens, hidden)), "list": ((1,), (listed,), (listed,))}
        )
        for tokens, listed in ranges
    )
    weights = {weight.name: np.ones(tuple(weight.dims), np.uint16)}
    request = EngineRequest(model.SerializeToString(), weights, profiles, BuildConfig())
    backend("tensorrt_rtx").build_engine(request, lambda data: sizes.append(len(data)), lambda *_: None, lambda line: None)
    return sum(sizes)


if __name__ == "__main__":
    main()
