"""A Triton model repository for its TensorRT backend: a model per rank, <name>-rank{N}/config.pbtxt and <version>/model.plan.

The version's folder gets its name once it is complete, so a polling server never sees half a model. Inputs and outputs are
declared with all their dimensions (max_batch_size 0), because the caches' batch is an ordinary dimension.
"""

from __future__ import annotations

from orchestrator.base.errors import SpecError
from orchestrator.engines.record import TensorRange
from orchestrator.releases.layouts import Arrangement, Request, identity_files
from orchestrator.releases.manifest import RankRecord

_TYPES = {
    "float": "TYPE_FP32", "half": "TYPE_FP16", "bf16": "TYPE_BF16", "int8": "TYPE_INT8", "uint8": "TYPE_UINT8",
    "int32": "TYPE_INT32", "int64": "TYPE_INT64", "bool": "TYPE_BOOL",
    "float32": "TYPE_FP32", "float16": "TYPE_FP16", "bfloat16": "TYPE_BF16",
}  # fmt: skip
"""Dtypes of model_config.proto, by TensorRT's names."""


def arrange(request: Request) -> Arrangement:
    """See Layout. Raises SpecError for dtypes that Triton does not have (an FP8 KV cache)."""
    version = request.manifest.version if request.manifest.version.isdigit() and int(request.manifest.version) else "1"
    paths: dict[str, str] = {}
    written: dict[str, bytes] = {}
    renames = []
    for number, record in enumerate(request.records()):
        model = f"{request.manifest.name}-rank{record.rank}"
        folder = f"{model}/{int(version)}"
        paths |= {file.path: f"{folder}/model.plan" for file in record.files if file.role == "engine"}
        written[f"{model}/config.pbtxt"] = _config(model, record, number).encode()
        renames.append((f"{model}/.{int(version)}.part", folder))
    # Other files go into a folder without a version, which Triton ignores by default.
    paths |= {file.path: f".release/{file.path}" for file in request.files if file.path not in paths}
    written |= {f".release/{name}": data for name, data in identity_files(request).items()}
    return Arrangement(paths, written, tuple(renames))


def _config(model: str, record: RankRecord, gpu: int) -> str:
    """Return config.pbtxt. `gpu`: index of the rank in this repository."""
    profiles = ", ".join(f'"{number}"' for number in range(len(record.engine.profiles)))
    blocks = [f'name: "{model}"', 'platform: "tensorrt_plan"', "max_batch_size: 0"]
    blocks += [_tensor("input", tensor) for tensor in record.engine.tensors if tensor.mode == "input"]
    blocks += [_tensor("output", tensor) for tensor in record.engine.tensors if tensor.mode == "output"]
    blocks.append(f"instance_group [\n  {{ count: 1 kind: KIND_GPU gpus: [ {gpu} ] profile: [ {profiles} ] }}\n]")
    return "\n".join(blocks) + "\n"


def _tensor(kind: str, tensor: TensorRange) -> str:
    if tensor.dtype not in _TYPES:
        raise SpecError(f"{tensor.name} is {tensor.dtype}, which Triton's model configuration does not have", "Use --layout flat.")
    dims = ", ".join("-1" if isinstance(size, str) else str(size) for size in tensor.shape)
    return f"{kind} [\n  {{ name: {_quoted(tensor.name)} data_type: {_TYPES[tensor.dtype]} dims: [ {dims} ] }}\n]"


def _quoted(text: str) -> str:
    """Quote a string of protobuf's text format; no character of a manifest's name can end it."""
    return (
        '"'
        + "".join(character if character.isprintable() and character not in '"\\' else _octal(character) for character in text)
        + '"'
    )


def _octal(character: str) -> str:
    return "".join(f"\\{byte:03o}" for byte in character.encode())
