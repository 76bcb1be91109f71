"""A thin writer of ONNX graphs: every call adds a node and returns the name of its output."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

OPSET = 24
IR_VERSION = 11
ONNX_DTYPES: dict[str, int] = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "bfloat16": TensorProto.BFLOAT16,
    "int64": TensorProto.INT64,
    "int32": TensorProto.INT32,
}
Dim = int | str


class GraphWriter:
    """Collects nodes, inputs, outputs, and initializers without data."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._nodes: list[onnx.NodeProto] = []
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []
        self._initializers: dict[str, onnx.TensorProto] = {}

    def input(self, name: str, dtype: str, shape: Sequence[Dim]) -> str:
        self._inputs.append(helper.make_tensor_value_info(name, ONNX_DTYPES[dtype], list(shape)))
        return name

    def output(self, name: str, dtype: str, shape: Sequence[Dim]) -> None:
        self._outputs.append(helper.make_tensor_value_info(name, ONNX_DTYPES[dtype], list(shape)))

    def external(self, name: str, dtype: str, shape: Sequence[int]) -> str:
        """An initializer whose data is bound by name when the graph is compiled or run."""
        if name not in self._initializers:
            tensor = TensorProto(name=name, data_type=ONNX_DTYPES[dtype], dims=shape, data_location=TensorProto.EXTERNAL)
            tensor.external_data.add(key="location", value="bound-by-name")
            self._initializers[name] = tensor
        return name

    def constant(self, name: str, values: npt.ArrayLike) -> str:
        """A small int64 constant; one of the same name is shared."""
        if name not in self._initializers:
            self._initializers[name] = numpy_helper.from_array(np.asarray(values, np.int64), name)
        return name

    def scalar(self, name: str, value: float, dtype: str) -> str:
        """A constant of no dimensions; one of the same name is shared."""
        if name not in self._initializers:
            self._initializers[name] = helper.make_tensor(name, ONNX_DTYPES[dtype], [], [value])
        return name

    @staticmethod
    def onnx_dtype(dtype: str) -> int:
        """ONNX's number of a dtype, for Cast."""
        return ONNX_DTYPES[dtype]

    def node(self, op: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        """Add a node with one output; its name is the output's."""
        self.nodes(op, inputs, [output], **attributes)
        return output

    def nodes(self, op: str, inputs: Sequence[str], outputs: Sequence[str], **attributes: Any) -> None:
        self._nodes.append(helper.make_node(op, list(inputs), list(outputs), name=outputs[0], **attributes))

    def model(self) -> onnx.ModelProto:
        graph = helper.make_graph(
            self._nodes, self.name, self._inputs, self._outputs, initializer=list(self._initializers.values())
        )
        return helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION, producer_name="trt-orchestrator"
        )
