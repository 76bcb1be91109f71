"""Execute a portable graph slice by slice: one rank's part of one layer in memory, all calls through it, then the next."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from orchestrator.model.stage import StageOptions
from orchestrator.networks.kv_cache import PAST, PRESENT, present_of
from orchestrator.networks.slices import cut_portable
from orchestrator.work.verify.inputs import Call
from orchestrator.work.verify.ort import first_rows, ort_value, run_session
from orchestrator.work.verify.stage_run import FirstCaches, Sessions, feeds, result_name

Array = npt.NDArray[Any]
_M_MMAP_THRESHOLD = -3
"""Parameter of mallopt(3)."""
_WITHOUT_NUMPY = {onnx.TensorProto.BFLOAT16: np.uint16, onnx.TensorProto.FLOAT8E4M3FN: np.uint8}


class SlicedGraph:
    """A portable graph, and the files that its initializers lie in."""

    def __init__(self, model: onnx.ModelProto, files: Mapping[str, Path]) -> None:
        """`files`: by the name that the graph locates them with."""
        self._sliced = cut_portable(model.graph)
        self._tensors = {
            tensor.name: tensor for tensor in model.graph.initializer if tensor.data_location == onnx.TensorProto.EXTERNAL
        }
        self._files = files
        self._sessions = Sessions(model.opset_import)

    def run(
        self,
        stage: StageOptions,
        calls: Sequence[Call],
        hidden_states: Sequence[Array | None],
        report: Callable[[int, int], None],
    ) -> list[Array]:
        """Return the result of every call: hidden states [B, S, hidden], or logits [B, 1, vocabulary] of the last tokens.

        `hidden_states`: results of the stage before, by call; None on the first stage.
        """
        _return_large_blocks()
        values = [feeds(stage, call, before) for call, before in zip(calls, hidden_states, strict=True)]
        positions = 1 + max(int(call.position_ids.max()) for call in calls)
        empty = FirstCaches(stage, len(calls[0].input_ids), stage.config.cache_slots(positions), halved=True)
        kept = result_name(stage)
        slices = self._sliced.slices
        for number, part in enumerate(slices):
            weights = inputs = session = None  # the weights of the slice before are dropped first
            weights = [self._weight(name) for name in part.weights]
            cache: dict[str, Any] = {}
            for call, mine in zip(calls, values, strict=True):
                inputs = [_cached(cache, empty, name, call) if name.startswith(PAST) else mine[name] for name in part.inputs]
                inputs += weights
                session = session or self._sessions.of(part, inputs)
                for name, value in zip(part.outputs, run_session(session, inputs), strict=True):
                    if name.startswith(PRESENT):
                        if not call.repeats:
                            cache[name] = value
                    elif name == kept or self._sliced.is_read_after(name, number):
                        mine[name] = value
                for name in [name for name in mine if name != kept and self._sliced.last_use.get(name) == number]:
                    del mine[name]
            report(number + 1, len(slices))
        return [mine[kept].numpy() for mine in values]

    def _weight(self, name: str) -> Any:
        """Return a stored initializer as an OrtValue, read from the place that the graph names."""
        tensor = self._tensors[name]
        where = {entry.key: entry.value for entry in tensor.external_data}
        # Not mapped: pages of a slice that has run would stay in memory.
        path, size, begin = self._files[where["location"]], int(where["length"]), int(where["offset"])
        data = np.fromfile(path, np.uint8, size, offset=begin)
        plain = _WITHOUT_NUMPY.get(tensor.data_type, onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type))
        return ort_value(data.view(plain).reshape(tuple(tensor.dims)), tensor.data_type)


def _cached(cache: Mapping[str, Any], empty: FirstCaches, name: str, call: Call) -> Any:
    """Return the cache that a call reads: the one left by the previous call."""
    found = cache.get(present_of(name), empty.of(name))
    return first_rows(found, len(call.input_ids)) if call.repeats else found


def _return_large_blocks() -> None:
    """Let glibc return freed blocks of a megabyte or more to the system.

    By default it keeps those below 32 MiB once one of their size was freed, and widened weights of several slices pile up.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 2**20)
