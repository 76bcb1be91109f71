"""Calibration on a GPU: our actor under Ray against a plain Model Optimizer script, same model, same tokens, one run.

    python -m benchmarks.calibration_gpu                 a seeded Llama of 8 billion parameters
    python -m benchmarks.calibration_gpu --tiny          a few layers, on whatever there is
    python -m benchmarks.calibration_gpu --two-gpus      a sweep in two parts on two GPUs at once, against one GPU

Prints seconds from the start of loading to the end of calibration, their ratio, peak GPU memory of both, and whether the
scales are equal. The model is written to --folder first (16 GB) and read by both in turn.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

SHAPES = {
    False: {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256,
    },
    True: {
        "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 512,
    },
}  # fmt: skip
DATA = {False: (64, 512, 16), True: (8, 32, 4)}
"""Samples, tokens of each, samples per batch."""
PRESETS = {"FP8": "FP8_DEFAULT_CFG", "NVFP4": "NVFP4_DEFAULT_CFG", "W4A16_AWQ": "INT4_AWQ_CFG"}


def main() -> None:
    """Write the model, calibrate it both ways under every algorithm, print the comparison."""
    arguments = _arguments()
    if arguments.plain:
        _plain(Path(arguments.folder), arguments.plain, arguments.tiny)
        return
    import torch

    folder = Path(arguments.folder).resolve()
    source = _write_model(folder / ("tiny" if arguments.tiny else "llama-8b"), arguments.tiny)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    samples, length, batch = DATA[arguments.tiny]
    print(f"{device}; torch {torch.__version__}; {samples} samples of {length} tokens, batches of {batch}", flush=True)
    if arguments.two_gpus:
        _two_gpus(folder, source, arguments.algorithms.split(","), arguments.tiny, device)
        return
    for algorithm in arguments.algorithms.split(","):
        ratios = [_round(folder, source, algorithm, arguments.tiny, device) for _ in range(arguments.rounds)]
        print(f"{algorithm:10} median ratio {statistics.median(ratios):.2f} of {len(ratios)} rounds", flush=True)


def _round(folder: Path, source: Path, algorithm: str, tiny: bool, device: str) -> float:
    """Both once, the source's page cache dropped before each; prints a line, returns ours / plain."""
    drop_page_cache(source)
    theirs = _run_plain(folder, source, algorithm, tiny)
    drop_page_cache(source)
    ours = _run_ours(folder, source, algorithm, tiny, gpu=device != "cpu")
    same, count = _compare(folder, algorithm, ours["scales"])
    ratio: float = ours["seconds"] / theirs["seconds"]
    print(
        f"{algorithm:10} ours {ours['seconds']:7.1f} s ({ours['load']:.1f} loading), {ours['gpu'] / 1e9:6.2f} GB   "
        f"plain {theirs['seconds']:7.1f} s, {theirs['gpu'] / 1e9:6.2f} GB   "
        f"ratio {ratio:.2f}   {same} of {count} scales equal",
        flush=True,
    )
    return ratio


def drop_page_cache(folder: Path) -> None:
    """Both read from the disk, as from a source that was not just written."""
    os.sync()
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--folder", default=".cache/benchmarks/calibration")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--algorithms", default="FP8,NVFP4,W4A16_AWQ")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--two-gpus", action="store_true")
    parser.add_argument("--plain", default="", help=argparse.SUPPRESS)
    return parser.parse_args()


def _write_model(folder: Path, tiny: bool) -> Path:
    """A Hugging Face folder with seeded weights, a file per layer; kept from run to run."""
    if (folder / "config.json").exists():
        return folder
    import torch
    import transformers
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    config = transformers.LlamaConfig(**SHAPES[tiny], max_position_embeddings=4096, tie_word_embeddings=False, dtype="bfloat16")
    config.architectures = ["LlamaForCausalLM"]
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in transformers.LlamaForCausalLM(config).state_dict().items()}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(1)
    groups: dict[str, list[str]] = {}
    for name in shapes:
        groups.setdefault(name.split(".")[2] if ".layers." in name else "rest", []).append(name)
    listing = {}
    for number, names in enumerate(groups.values()):
        file = f"model-{number + 1:05d}-of-{len(groups):05d}.safetensors"
        tensors = {}
        for name in names:
            scale = 1.0 if name.endswith("norm.weight") else 0.02
            drawn = torch.randn(shapes[name], generator=generator, device=device) * scale
            tensors[name] = (drawn.abs() if scale == 1.0 else drawn).to(torch.bfloat16).cpu()
        save_file(tensors, folder / file, metadata={"format": "pt"})
        listing |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": listing}))
    config.save_pretrained(folder)
    return folder


def _tokens(tiny: bool) -> Any:
    import torch

    from orchestrator.quantizers.calibration_data import CalibrationData, calibration_tokens

    samples, length, batch = DATA[tiny]
    data = CalibrationData(dataset="default", digest=None, num_samples=samples, max_length=length, batch_size=batch, seed=1234)
    return torch.from_numpy(calibration_tokens(data, "", Path("/nowhere"), SHAPES[tiny]["vocab_size"]))


def _run_plain(folder: Path, source: Path, algorithm: str, tiny: bool) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.calibration_gpu", "--plain", f"{source},{algorithm}", "--folder", str(folder)]
    result = subprocess.run([*command, *(["--tiny"] if tiny else [])], check=True, capture_output=True, text=True)
    found: dict[str, float] = json.loads(result.stdout.splitlines()[-1])
    return found


def _plain(folder: Path, wanted: str, tiny: bool) -> None:
    """What a user of Model Optimizer writes: load, quantize, done. Imports count, as they do in our actor."""
    began = time.monotonic()
    import modelopt.torch.quantization as mtq
    import torch
    import transformers
    from safetensors.torch import save_file

    source, _, algorithm = wanted.rpartition(",")
    ids, batch = _tokens(tiny), DATA[tiny][2]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16, device_map=device).eval()

    def forward(quantized: Any) -> None:
        with torch.inference_mode():
            for begin in range(0, len(ids), batch):
                quantized(ids[begin : begin + batch].to(device), use_cache=False)

    with contextlib.redirect_stdout(io.StringIO()):
        mtq.quantize(model, getattr(mtq, PRESETS[algorithm]), forward)
    seconds = time.monotonic() - began
    scales = {}
    for name, module in model.named_modules():
        if hasattr(module, "weight_quantizer") and name != "lm_head":
            for quantity, value in (
                ("input_amax", module.input_quantizer.amax),
                ("weight_amax", module.weight_quantizer.amax),
                ("own_pre_quant_scale", module.input_quantizer.pre_quant_scale),
            ):
                if value is not None and (quantity == "own_pre_quant_scale" or value.numel() == 1):
                    scales[f"{name}.{quantity}"] = (
                        value.detach().float().reshape(value.shape if value.dim() else ()).cpu().contiguous()
                    )
    save_file(scales, folder / f"plain-{algorithm}.safetensors")
    gpu = torch.cuda.max_memory_allocated() if device == "cuda" else 0
    print(json.dumps({"seconds": seconds, "gpu": gpu}))


def _run_ours(folder: Path, source: Path, algorithm: str, tiny: bool, *, gpu: bool) -> dict[str, Any]:
    """The calibrate step of a build, in its Ray actor."""
    import shutil

    from actors import RayCluster
    from orchestrator.planning import preparation
    from orchestrator.planning.steps import Kind
    from orchestrator.quantizing import calibrate
    from orchestrator.scheduling import commits
    from orchestrator.stores import open_store

    spec, place = _asked(folder, source, algorithm, tiny, num_gpus=int(gpu))
    output = folder / f"ours-{algorithm}"
    shutil.rmtree(output, ignore_errors=True)
    (step,) = preparation.plan(spec).of_kind(Kind.CALIBRATE)
    calibrate(spec, output, place, open_cluster=RayCluster)
    outcome = commits.lookup(open_store(place.store), step.digest)
    assert outcome is not None
    return {
        "seconds": outcome.seconds,
        "load": outcome.facts.load_seconds,
        "gpu": outcome.facts.peak_gpu_memory_bytes,
        "scales": output / "scales.safetensors",
    }


def _asked(folder: Path, source: Path, algorithm: str, tiny: bool, *, num_gpus: int, num_stages: int = 1) -> tuple[Any, Any]:
    """Spec and cluster of a calibration, with a store of its own: a step that is committed already would not be run again."""
    import tempfile

    from orchestrator.spec.build import BuildSpec
    from orchestrator.spec.cluster import ClusterSpec
    from orchestrator.spec.decoding import decode

    samples, length, batch = DATA[tiny]
    data = {
        "num_samples": samples, "max_length": length, "batch_size": batch, "device": "cuda" if num_gpus else "cpu",
        "num_stages": num_stages,
    }  # fmt: skip
    spec = decode(
        BuildSpec,
        {
            "source": {"path": str(source)},
            "dtype": "bfloat16",
            "quantization": {"algorithm": algorithm, "calibration": data},
            "release": {"name": "benchmark", "version": "1"},
        },
        "benchmark",
    )
    store = Path(tempfile.mkdtemp(prefix="store-", dir=folder)).as_uri()
    place = {"kind": "ray", "store": store, "pools": {"gpu": {"gpus": num_gpus}}, "threads_per_step": 8}
    return spec, decode(ClusterSpec, place, "benchmark")


def _two_gpus(folder: Path, source: Path, algorithms: list[str], tiny: bool, device: str) -> None:
    """Every algorithm in two parts, a part an actor of its own: on two GPUs at once, then on one."""
    seconds = {}
    for num_gpus in (0,) if device == "cpu" else (2, 1):
        drop_page_cache(source)
        seconds[num_gpus], steps = _parts(folder, source, algorithms, tiny, num_gpus)
        print(f"{num_gpus} GPUs: {seconds[num_gpus]:.1f} s, at most {_most_at_once(steps)} actors at once", flush=True)
        for name, (began, ended, node) in sorted(steps.items(), key=lambda item: item[1]):
            print(f"    {began:6.1f} .. {ended:6.1f} s  {name:32} {node}", flush=True)
    print(f"ratio {seconds[max(seconds)] / seconds[min(seconds)]:.2f}", flush=True)


def _parts(
    folder: Path, source: Path, algorithms: list[str], tiny: bool, num_gpus: int
) -> tuple[float, dict[str, tuple[float, float, str]]]:
    """Seconds of the whole, and of every step its begin, end and node."""
    from actors import RayCluster
    from orchestrator.events import Event, StepStarted, StepSucceeded
    from orchestrator.planning import preparation
    from orchestrator.planning.steps import Kind
    from orchestrator.quantizing import only, union
    from orchestrator.scheduling import execute

    began = time.monotonic()
    asked = [_asked(folder, source, algorithm, tiny, num_gpus=num_gpus, num_stages=2) for algorithm in algorithms]
    made = union([only(preparation.plan(spec), (Kind.CALIBRATE,)) for spec, _ in asked], algorithms)
    spans: dict[str, tuple[float, float, str]] = {}

    def clock(event: Event) -> None:
        now = time.monotonic() - began
        if isinstance(event, StepStarted):
            spans[event.step] = (now, now, event.node)
        elif isinstance(event, StepSucceeded):
            spans[event.step] = (spans[event.step][0], now, spans[event.step][2])

    result = execute.execute(made, {}, asked[0][1], RayCluster, clock)
    result.raise_failures(made)
    return time.monotonic() - began, spans


def _most_at_once(steps: dict[str, tuple[float, float, str]]) -> int:
    return max(sum(begin <= moment < end for begin, end, _ in steps.values()) for moment, _, _ in steps.values())


def _compare(folder: Path, algorithm: str, ours: Path) -> tuple[int, int]:
    """How many of the plain script's scales are ours to the bit."""
    import torch
    from safetensors.torch import load_file

    mine, plain = load_file(ours), load_file(folder / f"plain-{algorithm}.safetensors")
    equal = [name for name, value in plain.items() if name in mine and torch.equal(mine[name].reshape(-1), value.reshape(-1))]
    return len(equal), len(plain)


if __name__ == "__main__":
    main()
