"""A Triton model repository for its TensorRT backend: a model per pipeline stage, and an ensemble that chains the stages.

<name>/config.pbtxt and <name>/<version>/model.plan; with several stages <name>-stage{N} each, and the ensemble <name>. The
version's folder gets its name once it is complete, so a polling server never sees half a model. Other files of the release stand in
a folder of a model, where Triton ignores what is not a version. A folder beside the models would count as a broken model.

What the backend does decides what is refused here (its source and docs/multi_device.md, Triton 2.71):

- It loads engines of TensorRT, not of TensorRT-RTX.
- It binds every input and output to a buffer of its own. TensorRT refuses that for caches updated in place.
- The tp ranks of a stage run in one process as one KIND_MODEL instance with one optimization profile. Rank 0's inputs are copied to
  every rank and rank 0's outputs returned, so the caches of the other ranks are lost after each call.
- With tp=1, Triton keeps the caches between the calls of a sequence (sequence_batching.state).

max_batch_size is 0: the batch is an ordinary dimension of every tensor.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from orchestrator.base.errors import SpecError
from orchestrator.engines.record import TensorRange
from orchestrator.releases.asked import asked_engine
from orchestrator.releases.layouts import Arrangement, Request, identity_files
from orchestrator.releases.layouts.text_format import Field, quoted, text_of
from orchestrator.releases.manifest import RankRecord

_TYPES = {
    "float": "TYPE_FP32", "half": "TYPE_FP16", "bf16": "TYPE_BF16", "int8": "TYPE_INT8", "uint8": "TYPE_UINT8",
    "int32": "TYPE_INT32", "int64": "TYPE_INT64", "bool": "TYPE_BOOL",
    "float32": "TYPE_FP32", "float16": "TYPE_FP16", "bfloat16": "TYPE_BF16",
}  # fmt: skip
"""Dtypes of model_config.proto, by TensorRT's names."""
_PAST, _PRESENT = "past_key_values.", "present_key_values."
_REBUILD = "Build with engine: {backend: tensorrt, for_triton: true}, or run the release as it is: `orchestrator run`."
_IDLE_MICROSECONDS = 60_000_000
"""Idle time after which Triton drops a sequence and its caches."""
_PREFILL_ONLY = (
    "prefill only: the server copies rank 0's inputs to every rank and drops the KV caches of the others, so no call can continue "
    "from another; give the caches as zeros"
)
_ONE_SEQUENCE = "a request is one sequence; its calls carry one correlation ID, and Triton keeps the KV caches between them"


def arrange(request: Request) -> Arrangement:
    """See Layout. Raises SpecError for engines that Triton's backend cannot run, and for a stage without all of its ranks."""
    stages = _stages(request)
    name, version = request.manifest.name, _version(request.manifest.version)
    whole = len(stages) == request.manifest.pp
    models = [name if request.manifest.pp == 1 else f"{name}-stage{ranks[0].pp_rank}" for ranks in stages]
    note = _ONE_SEQUENCE if request.manifest.tp == 1 else _PREFILL_ONLY
    paths: dict[str, str] = {}
    written: dict[str, bytes] = {}
    links: dict[str, str] = {}
    first_gpu = 0
    for model, ranks in zip(models, stages, strict=True):
        folder = f"{model}/{version}"
        plans = ["model.plan"] if len(ranks) == 1 else [f"model.plan.rank{record.tp_rank}" for record in ranks]
        for record, plan in zip(ranks, plans, strict=True):
            paths |= {file.path: f"{folder}/{plan}" for file in record.files if file.role == "engine"}
        if len(ranks) > 1:
            links[f"{folder}/model.plan"] = plans[0]  # the repository check wants a file of this name
        written[f"{model}/config.pbtxt"] = text_of(_stage_model(model, ranks, first_gpu), note)
        first_gpu += len(ranks)
    folders = [f"{model}/{version}" for model in models]
    if whole and len(stages) > 1:
        written[f"{name}/{version}/.keep"] = b""  # an ensemble needs a version too, which may be empty
        written[f"{name}/config.pbtxt"] = text_of(_ensemble(name, models, stages), note)
        folders.append(f"{name}/{version}")
    paths |= {file.path: f"{models[0]}/release/{file.path}" for file in request.files if file.path not in paths}
    written |= {f"{models[0]}/release/{path}": data for path, data in identity_files(request).items()}
    renames = tuple((f"{folder.rpartition('/')[0]}/.{version}.part", folder) for folder in folders)
    return Arrangement(paths, written, renames, links, (f"Triton: {note}.",))


def _version(text: str) -> str:
    """Return the number of the version's folder, which Triton wants."""
    return str(int(text)) if text.isdigit() and int(text) else "1"


def _stages(request: Request) -> list[list[RankRecord]]:
    """Return the requested ranks by pipeline stage, in order. Raises SpecError for what the backend cannot run."""
    manifest = request.manifest
    if manifest.selectors.backend != "tensorrt":
        raise SpecError(
            f"{manifest.name} {manifest.version} holds engines of {manifest.selectors.backend}, which Triton cannot load", _REBUILD
        )
    stages: dict[int, list[RankRecord]] = {}
    for record in sorted(request.records(), key=lambda record: (record.pp_rank, record.tp_rank)):
        _check_engine(record, manifest.tp)
        stages.setdefault(record.pp_rank, []).append(record)
    for pp_rank, ranks in stages.items():
        if len(ranks) != manifest.tp:
            raise SpecError(
                f"stage {pp_rank} has {manifest.tp} ranks, of which {len(ranks)} were asked for: Triton runs them in one process",
                f"Ask for --rank {pp_rank * manifest.tp}-{(pp_rank + 1) * manifest.tp - 1} or more.",
            )
    if manifest.tp > 1 and not asked_engine(manifest).gather_logits:
        raise SpecError(
            "each rank returns its slice of the logits, and Triton returns those of rank 0 only",
            "Build with engine.gather_logits: true.",
        )
    return list(stages.values())


def _check_engine(record: RankRecord, tp: int) -> None:
    in_place = next((tensor.name for tensor in record.engine.tensors if tensor.aliases is not None), None)
    if in_place is not None:
        raise SpecError(
            f"rank {record.rank} updates {in_place} in place, but Triton binds outputs to buffers of their own, "
            "which TensorRT refuses",
            _REBUILD,
        )
    num_profiles = len(record.engine.profiles)
    if tp > 1 and num_profiles > 1:
        raise SpecError(f"rank {record.rank} has {num_profiles} optimization profiles, and Triton takes one with tp={tp}", _REBUILD)


def _stage_model(model: str, ranks: Sequence[RankRecord], first_gpu: int) -> list[Field]:
    """Return the configuration of a stage. `first_gpu`: index of its first GPU; the others follow."""
    tensors = ranks[0].engine.tensors
    head: list[Field] = [("name", quoted(model)), ("backend", '"tensorrt"'), ("max_batch_size", "0")]
    if len(ranks) == 1:
        plain = [tensor for tensor in tensors if not tensor.name.startswith((_PAST, _PRESENT))]
        profiles: list[Field] = [("profile", f'"{number}"') for number in range(len(ranks[0].engine.profiles))]
        group: list[Field] = [("count", "1"), ("kind", "KIND_GPU"), ("gpus", str(first_gpu)), *profiles]
        return [*head, *_tensors(plain), ("sequence_batching", _states(tensors)), ("instance_group", group)]
    gpus = ",".join(str(first_gpu + number) for number in range(len(ranks)))
    return [
        *head,
        *_tensors(tensors),
        ("instance_group", [("count", "1"), ("kind", "KIND_MODEL")]),
        _parameter("enable_multi_device", "true"),
        _parameter("multi_device_gpus", gpus),
        _parameter("multi_device_per_rank_engines", "true"),
    ]


def _parameter(key: str, value: str) -> Field:
    return "parameters", [("key", quoted(key)), ("value", [("string_value", quoted(value))])]


def _tensors(tensors: Iterable[TensorRange]) -> list[Field]:
    return [(tensor.mode, [("name", quoted(tensor.name)), *_typed(tensor)]) for tensor in tensors]


def _states(tensors: Iterable[TensorRange]) -> list[Field]:
    """Return sequence_batching: every cache is a state that starts as zeros for one sequence."""
    fields: list[Field] = [("max_sequence_idle_microseconds", str(_IDLE_MICROSECONDS)), ("direct", [])]
    for tensor in tensors:
        if tensor.name.startswith(_PAST):
            first: list[Field] = [("name", quoted(f"empty {tensor.name}")), *_typed(tensor, dynamic="1"), ("zero_data", "true")]
            state: list[Field] = [
                ("input_name", quoted(tensor.name)),
                ("output_name", quoted(tensor.name.replace(_PAST, _PRESENT, 1))),
                *_typed(tensor),
                ("initial_state", first),
                ("use_same_buffer_for_input_output", "true"),
            ]
            fields.append(("state", state))
    return fields


def _typed(tensor: TensorRange, dynamic: str = "-1") -> list[Field]:
    if tensor.dtype not in _TYPES:
        raise SpecError(f"{tensor.name} is {tensor.dtype}, which Triton's model configuration does not have", "Use --layout flat.")
    dims: list[Field] = [("dims", dynamic if isinstance(size, str) else str(size)) for size in tensor.shape]
    return [("data_type", _TYPES[tensor.dtype]), *dims]


def _ensemble(name: str, models: Sequence[str], stages: Sequence[Sequence[RankRecord]]) -> list[Field]:
    """Return the configuration of the whole model: hidden states go from stage to stage, caches of stage N are called stageN.*."""
    inputs: dict[str, TensorRange] = {}
    outputs: dict[str, TensorRange] = {}
    steps: list[Field] = []
    for number, (model, ranks) in enumerate(zip(models, stages, strict=True)):
        step: list[Field] = [("model_name", quoted(model)), ("model_version", "-1")]
        for tensor in ranks[0].engine.tensors:
            is_cache = tensor.name.startswith((_PAST, _PRESENT))
            if is_cache and (len(ranks) == 1 or tensor.mode == "output"):
                continue
            outer = f"stage{number}.{tensor.name}" if is_cache else tensor.name
            if tensor.name in ("hidden_states", "hidden_states_out"):
                outer = f"hidden_states.{number + (tensor.mode == 'output')}"
            elif tensor.mode == "input":
                inputs.setdefault(outer, tensor.model_copy(update={"name": outer}))
            else:
                outputs[outer] = tensor
            step.append((f"{tensor.mode}_map", [("key", quoted(tensor.name)), ("value", quoted(outer))]))
        steps.append(("step", step))
    head: list[Field] = [("name", quoted(name)), ("platform", '"ensemble"'), ("max_batch_size", "0")]
    return [*head, *_tensors([*inputs.values(), *outputs.values()]), ("ensemble_scheduling", steps)]
