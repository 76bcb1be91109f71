"""Execute every rank of a pipeline stage in lockstep; on the last stage, compare with the reference.

The hidden states of all calls go from one stage's verify step to the next as a file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from orchestrator.base.errors import BUG, OrchestratorError, ToolError
from orchestrator.planning.facts import ReferenceFacts, Verification, VerifyFacts
from orchestrator.planning.options import VerifyOptions
from orchestrator.planning.steps import Kind, Output, Task
from orchestrator.work.context import Context
from orchestrator.work.device import verification_device
from orchestrator.work.reference.step import HIDDEN_STATES as REFERENCE_STATES
from orchestrator.work.reference.step import OUTPUT as REFERENCE
from orchestrator.work.resume import LayerStates
from orchestrator.work.shards import map_shards, rank_shards
from orchestrator.work.verify import compare
from orchestrator.work.verify.inputs import Place, make_calls, positions_of, repeated
from orchestrator.work.verify.lockstep import Lockstep

Array = npt.NDArray[Any]
_ERRORS = "layer errors"
HIDDEN_STATES = "hidden_states.safetensors"
"""File with call{i} float32 [B, S, hidden]: the input of the next stage."""
LOGITS = "logits.safetensors"
"""File with call{i} float32 [B, 1, vocabulary]: the last stage's logits of every sequence's last token."""


def verify(task: Task, context: Context) -> VerifyFacts:
    """Run the stage. Facts: digests of the ranks' networks, errors of the hidden states at the end of every layer so far, and on
    the last stage the verification numbers.

    Raises VerificationError above tolerance, or when ranks differ where they must agree.
    """
    from safetensors.numpy import load_file, save

    options = VerifyOptions.model_validate(task.step.options)
    stage = options.network.stage
    weights = [map_shards(rank_shards(task, context, stage.rank(tp_rank))) for tp_rank in range(stage.tp)]
    reference = load_file(context.fetch(_needed(task, Kind.REFERENCE, REFERENCE)))
    lengths = reference["lengths"]
    repeats = repeated(options.network, len(lengths))
    calls = make_calls(reference["tokens"], lengths, options.decode_steps, repeats)
    places = list(positions_of(lengths, options.decode_steps, repeats))
    previous: list[Array] = []
    if not stage.is_first:
        handed = load_file(context.fetch(_needed(task, Kind.VERIFY, HIDDEN_STATES)))
        previous = [handed[f"call{number}"] for number in range(len(calls))]
    device = verification_device(task)
    context.log(f"verify: slices on {device}")
    ranks = Lockstep(options.network, weights, calls, previous, device)
    layers = _LayerErrors(context.fetch(_needed(task, Kind.REFERENCE, REFERENCE_STATES)), places)
    states = LayerStates(context, task.step.digest, only_last=True)
    last = None
    for layer, state in states.saved().items():
        last = layer, layers.take(state)
        context.log(f"verify: an earlier attempt finished layer {layer}: resume after it")
    results = ranks.run(
        lambda done, total: context.report("verify", done, total, "steps"),
        layers.watch,
        lambda layer, state: states.keep(layer, lambda: layers.put(state())),
        last,
    )
    errors = {**_earlier_errors(task), **layers.errors}
    facts = VerifyFacts(
        stage=stage.pp_rank,
        networks=tuple(options.network.digest(tp_rank) for tp_rank in range(stage.tp)),
        layer_errors=errors,
    )
    if not stage.is_last:
        data = save({f"call{number}": np.ascontiguousarray(value) for number, value in enumerate(results)})
        with context.output(HIDDEN_STATES, len(data)) as writer:
            writer.write(data)
        return facts
    last_tokens = {f"call{number}": call.last_tokens(results[number]) for number, call in enumerate(calls)}
    data = save(last_tokens)
    with context.output(LOGITS, len(data)) as writer:
        writer.write(data)
    found = compare_with_reference(results, reference, places)
    context.log(f"verification: {found.model_dump()}")
    context.log("errors at the ends of the layers: " + ", ".join(f"{error:.1e}" for error in errors.values()))
    compare.check(found, options.tolerance, _advice(task), compare.where(errors))
    return facts.model_copy(update={"verification": found})


class _LayerErrors:
    """Errors of the hidden states at the ends of layers, relative to the reference's."""

    def __init__(self, path: Path, places: Sequence[Place]) -> None:
        self._path, self._places = path, places
        rows: dict[tuple[int, int], int] = {}
        self._rows = [rows.setdefault(place[:2], len(rows)) for place in places]
        self.errors: dict[int, float] = {}

    def watch(self, layer: int, hidden_states: Sequence[Array]) -> None:
        """Compare the hidden states at a layer's end, [B, S, hidden] by call."""
        from safetensors import safe_open

        with safe_open(self._path, "numpy") as file:
            expected = file.get_tensor(f"layer{layer}")
        found = np.stack([hidden_states[call][sequence, row] for sequence, _, call, row in self._places])
        self.errors[layer] = compare.relative_error(found, expected[self._rows])

    def put(self, state: dict[str, Array]) -> dict[str, Array]:
        """Return `state` with the errors so far."""
        return {**state, _ERRORS: np.array(list(self.errors.items()), np.float64)}

    def take(self, state: Mapping[str, Array]) -> dict[str, Array]:
        """Take the errors out of `state`, return the rest: the inverse of `put`."""
        self.errors = {int(layer): float(error) for layer, error in state[_ERRORS]}
        return {name: array for name, array in state.items() if name != _ERRORS}


def _earlier_errors(task: Task) -> dict[int, float]:
    """Return the errors of the layers of earlier stages."""
    earlier = (task.inputs[need] for need in task.step.needs if task.inputs[need].kind is Kind.VERIFY)
    return {layer: error for outcome in earlier for layer, error in outcome.facts_as(VerifyFacts).layer_errors.items()}


def _advice(task: Task) -> str:
    """Return the advice for ranks that differ from the reference."""
    options = VerifyOptions.model_validate(task.step.options)
    reference = next(task.inputs[need] for need in task.step.needs if task.inputs[need].kind is Kind.REFERENCE)
    is_text = reference.facts_as(ReferenceFacts).text == "text"
    return compare.advice(quantized=options.network.stage.quantization is not None, text=is_text)


def _needed(task: Task, kind: Kind, name: str) -> Output:
    for need in task.step.needs:
        if task.inputs[need].kind is kind:
            return task.inputs[need].output(name)
    raise ToolError(f"{task.step.name} has no {kind.value} step among its needs", BUG)


def compare_with_reference(results: Sequence[Array], theirs: Mapping[str, Array], places: Sequence[Place]) -> Verification:
    """Align the logits of all calls with the reference's positions and compare them. `places`: from `positions_of`."""
    try:
        logits = np.stack([results[call][sequence, row] for sequence, _, call, row in places])
        expected = np.stack([theirs["logits"][sequence, position] for sequence, position, _, _ in places])
    except (KeyError, IndexError) as error:
        raise OrchestratorError(f"the ranks returned fewer logits than requested: {error}", BUG) from error
    last = theirs["lengths"] - 1
    following = [
        theirs["tokens"][sequence, position + 1] if position < last[sequence] else -1 for sequence, position, _, _ in places
    ]
    found = compare.compare(logits, expected, np.array(following))
    to_source = found.max_relative_error
    if "source_logits" in theirs:
        own = np.stack([theirs["source_logits"][sequence, position] for sequence, position, _, _ in places])
        to_source = compare.compare(logits, own).max_relative_error
    return found.model_copy(update={"max_relative_error_to_source": to_source})
