"""Calibrate some layers on rank 0: Model Optimizer observes them on text. The result is a small artifact of scales.

Only this step ever calls Model Optimizer. It loads its own layers only and reads the hidden states of the layers before from a
file, so a model larger than any single machine is calibrated part by part.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import resource
import time
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from orchestrator.model.quantized_targets import expert_part, is_of_expert
from orchestrator.planning.calibration import layer_of
from orchestrator.planning.facts import CalibrateFacts
from orchestrator.planning.options import CalibrateOptions
from orchestrator.planning.steps import Kind, Task
from orchestrator.quantizers.calibration_data import calibration_tokens, has_tokenizer
from orchestrator.work.calibrate.part_model import PartModel, load_part
from orchestrator.work.companions import companion_folder
from orchestrator.work.context import Context
from orchestrator.work.device import device_of
from orchestrator.work.scales import SCALES

if TYPE_CHECKING:
    from orchestrator.quantizers.calibration_data import Tokens

RECIPE = "recipe.json"
"""Record of the calibration: method, data, tools."""
HIDDEN_STATES = "hidden_states.safetensors"
"""hidden_states [samples, length, hidden] in the model's dtype: the input of the next part."""
_PROGRESS_BAR = "%|"
"""Mark of lines that tqdm draws."""


def calibrate(task: Task, context: Context) -> CalibrateFacts:
    """Write scales, recipe and, except for the last part, hidden states. Raises QuantizationError and the source's errors."""
    import torch

    options = CalibrateOptions.model_validate(task.step.options)
    device = device_of(task, "quantization.calibration.device")
    tokens = _tokens(task, options, context)
    context.log(f"calibrate: {len(tokens)} samples of {tokens.shape[1]} tokens on {device}")
    if not has_tokenizer(context.scratch / "tokenizer"):
        context.log("warning: the source has no tokenizer, the model reads random token ids: its scales will be poor")
    elif len(tokens) < options.data.num_samples:
        context.log(f"calibrate: the package's text has no more samples; num_samples is {options.data.num_samples}")
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    inputs = torch.from_numpy(tokens) if options.is_first else _previous(task, context)
    began = time.monotonic()
    part = load_part(task.step.locations["source"], options, device)
    load_seconds = round(time.monotonic() - began, 3)
    context.log(f"calibrate: layers on {device} after {load_seconds} s")
    reader = _Reader(part, options, inputs, device, context)
    artifact = _run(part, options, reader, task, context)
    unseen = part.unseen()
    _fill_unseen(artifact, unseen)
    for expert in dict.fromkeys(map(_expert_of, unseen)):
        context.log(f"warning: no token was routed to {expert}: it gets the largest input_amax of its layer")
    if not options.is_last:
        _write_tensors(context, HIDDEN_STATES, {"hidden_states": reader.outputs()})
    _write_tensors(context, SCALES, {name: torch.from_numpy(np.asarray(value)) for name, value in artifact.items()})
    facts = CalibrateFacts(
        num_samples=len(tokens),
        num_tokens=int(tokens.size),
        num_linears=len(part.linears),
        unseen=tuple(sorted(unseen)),
        input_amax=_summary(artifact),
        device=device,
        load_seconds=load_seconds,
        peak_memory_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        peak_gpu_memory_bytes=torch.cuda.max_memory_allocated() if device == "cuda" else 0,
    )
    _write_recipe(context, options, tokens, facts)
    return facts


def _tokens(task: Task, options: CalibrateOptions, context: Context) -> Tokens:
    """Return the calibration tokens; every part of the chain makes the same ones."""
    folder = companion_folder(task.step.locations, options.files[options.num_weight_files :], context, options.format)
    return calibration_tokens(options.data, task.step.locations.get("dataset", ""), folder, options.config.vocab_size)


def _previous(task: Task, context: Context) -> Any:
    from safetensors.torch import load_file

    (need,) = (outcome for outcome in task.inputs.values() if outcome.kind is Kind.CALIBRATE)
    return load_file(context.fetch(need.output(HIDDEN_STATES)))["hidden_states"]


class _Reader:
    """Runs the part on its inputs, batch by batch, and keeps the first outputs of its last layer."""

    def __init__(self, part: PartModel, options: CalibrateOptions, inputs: Any, device: str, context: Context) -> None:
        self._part, self._options, self._inputs, self._device, self._context = part, options, inputs, device, context
        self._outputs: list[Any] = []
        self._num_batches = -(-len(inputs) // options.data.batch_size)
        if not options.is_last:
            part.model.model.layers[-1].register_forward_hook(self._keep)

    def __call__(self, _model: Any) -> None:
        """Run all inputs once. Model Optimizer calls this as often as its method needs."""
        size = self._options.data.batch_size
        for begin in range(0, len(self._inputs), size):
            self._part.run(self._inputs[begin : begin + size].to(self._device), self._options.is_first)
            self._context.report("calibrate", min(begin + size, len(self._inputs)), len(self._inputs), "steps")

    def _keep(self, _module: Any, _args: Any, output: Any) -> None:
        """Keep the outputs of the first pass, in which quantizers only observe: these are the model's own."""
        if len(self._outputs) < self._num_batches:
            self._outputs.append((output[0] if isinstance(output, tuple) else output).cpu())

    def outputs(self) -> Any:
        import torch

        return torch.cat(self._outputs)


def _run(part: PartModel, options: CalibrateOptions, reader: _Reader, task: Task, context: Context) -> dict[str, Any]:
    """Run Model Optimizer; its output goes to the step's log."""
    from orchestrator.quantizers import modelopt
    from orchestrator.work.calibrate.layerwise import LayerwiseFolder

    folder = LayerwiseFolder(context, task.step.digest, part).path if options.layerwise else None
    with _logged(context):
        artifact = modelopt.calibrate(part.model, reader, part.linears, options.method, options.formats, options.resmooth, folder)
    return {_global_name(name, options): value for name, value in artifact.items()}


@contextlib.contextmanager
def _logged(context: Context) -> Iterator[None]:
    """Write printed lines and warnings to the step's log, each once."""
    said = io.StringIO()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                yield
        finally:
            for line in dict.fromkeys([*said.getvalue().splitlines(), *(f"warning: {entry.message}" for entry in warned)]):
                if line.strip() and _PROGRESS_BAR not in line:
                    context.log(line)


def _global_name(name: str, options: CalibrateOptions) -> str:
    """Return a module's name in the whole model. Attention modules are named by their path in the part, linears by source."""
    if not name.endswith((".k_amax", ".v_amax")):
        return name
    local = layer_of(name)
    return name.replace(f".layers.{local}.", f".layers.{local + options.first_layer}.", 1)


def _summary(artifact: dict[str, Any]) -> dict[str, tuple[float, float, float]]:
    """Return the smallest, median and largest input_amax of the layers, by the linear's name (q_proj)."""
    found: dict[str, list[float]] = {}
    for name, value in artifact.items():
        if name.endswith(".input_amax"):
            found.setdefault(_kind_of(name.removesuffix(".input_amax")), []).append(float(value))
    return {linear: (min(values), float(np.median(values)), max(values)) for linear, values in sorted(found.items())}


def _fill_unseen(artifact: dict[str, Any], unseen: list[str]) -> None:
    """Give experts without tokens the largest input_amax of their layer's experts, by the kind of linear.

    Changes nothing where Model Optimizer recognizes the experts, because then it does the same.
    """
    suffix, largest = ".input_amax", dict[tuple[int, str], float]()
    for name, value in artifact.items():
        module = name.removesuffix(suffix)
        if name.endswith(suffix) and is_of_expert(module):
            kind = layer_of(module), _kind_of(module)
            largest[kind] = max(largest.get(kind, 0.0), float(value))
    for source in unseen if largest else ():
        artifact[source + suffix] = np.array(largest.get((layer_of(source), _kind_of(source))) or 1.0, np.float32)


def _kind_of(module: str) -> str:
    """Return the last part of a linear's name, or of the tensor's that holds it for all experts."""
    part = expert_part(module)
    return (part.tensor.removesuffix(".weight") if part else module).rpartition(".")[2]


def _expert_of(module: str) -> str:
    """Return the name of the expert that has a linear."""
    part = expert_part(module)
    if part is None:
        return module.rpartition(".")[0]
    return f"{part.tensor.removesuffix('.weight').rpartition('.')[0]}.{part.expert}"


def _write_tensors(context: Context, name: str, tensors: dict[str, Any]) -> None:
    from safetensors.torch import save

    data = save({key: value.contiguous() for key, value in tensors.items()})
    with context.output(name, len(data)) as writer:
        writer.write(data)


def _write_recipe(context: Context, options: CalibrateOptions, tokens: Tokens, facts: CalibrateFacts) -> None:
    import importlib.metadata

    for tool in ("nvidia-modelopt", "torch", "transformers"):
        context.tools[tool] = importlib.metadata.version(tool)
    recipe = {
        "method": options.method.model_dump(exclude_none=True),
        "formats": {name: fmt.model_dump(mode="json") for name, fmt in options.formats.items()},
        "layers": [options.first_layer, options.first_layer + options.num_layers],
        "data": options.data.model_dump(),
        "tokens_sha256": hashlib.sha256(np.ascontiguousarray(tokens).tobytes()).hexdigest(),
        "facts": facts.model_dump(mode="json"),
        "tools": context.tools,
    }
    data = json.dumps(recipe, indent=1).encode()
    with context.output(RECIPE, len(data)) as writer:
        writer.write(data)
