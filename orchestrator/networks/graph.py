"""Thin writer of ONNX graphs: every call adds a node and returns the name of its output."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from orchestrator.model.quantization import LinearFormat

OPSET = 24
IR_VERSION = 11
ONNX_DTYPES: dict[str, int] = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "bfloat16": TensorProto.BFLOAT16,
    "int64": TensorProto.INT64,
    "int32": TensorProto.INT32,
    "int8": TensorProto.INT8,
    "uint8": TensorProto.UINT8,
    "int4": TensorProto.INT4,
    "float8": TensorProto.FLOAT8E4M3FN,
    "float4": TensorProto.FLOAT4E2M1,
}
Dim = int | str
_BOUND = {"location": "bound-by-name"}


class GraphWriter:
    """Collects nodes, inputs, outputs, and initializers without data."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._nodes: list[onnx.NodeProto] = []
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []
        self._initializers: dict[str, onnx.TensorProto] = {}
        self.unpacked_weights: dict[str, LinearFormat] = {}
        """Weights that are dequantized before they are bound -> stored format."""

    def input(self, name: str, dtype: str, shape: Sequence[Dim]) -> str:
        self._inputs.append(helper.make_tensor_value_info(name, ONNX_DTYPES[dtype], list(shape)))
        return name

    def output(self, name: str, dtype: str, shape: Sequence[Dim]) -> None:
        self._outputs.append(helper.make_tensor_value_info(name, ONNX_DTYPES[dtype], list(shape)))

    def external(self, name: str, dtype: str, shape: Sequence[int], location: Mapping[str, str] = _BOUND) -> str:
        """Add an initializer whose data lies in a file. By default it is bound by name when the graph is compiled or run."""
        if name not in self._initializers:
            tensor = TensorProto(name=name, data_type=ONNX_DTYPES[dtype], dims=shape, data_location=TensorProto.EXTERNAL)
            for key, value in location.items():
                tensor.external_data.add(key=key, value=value)
            self._initializers[name] = tensor
        return name

    def unpacked(self, name: str, shape: Sequence[int], fmt: LinearFormat) -> str:
        """Add a float32 initializer that is dequantized when it is bound, because its format has no standard operator."""
        self.unpacked_weights[name] = fmt
        return self.external(name, "float32", shape)

    def shape_of(self, name: str) -> tuple[int, ...]:
        """Return the shape of an initializer."""
        return tuple(self._initializers[name].dims)

    def is_initializer(self, name: str) -> bool:
        return name in self._initializers

    def constant(self, name: str, values: npt.ArrayLike) -> str:
        """Add a small int64 constant, unless the name exists."""
        if name not in self._initializers:
            self._initializers[name] = numpy_helper.from_array(np.asarray(values, np.int64), name)
        return name

    def floats(self, name: str, values: npt.ArrayLike) -> str:
        """Add a small float32 constant, unless the name exists."""
        if name not in self._initializers:
            self._initializers[name] = numpy_helper.from_array(np.asarray(values, np.float32), name)
        return name

    def scalar(self, name: str, value: float, dtype: str) -> str:
        """Add a scalar constant, unless the name exists."""
        if name not in self._initializers:
            self._initializers[name] = helper.make_tensor(name, ONNX_DTYPES[dtype], [], [value])
        return name

    def ones(self, name: str, size: int, dtype: str) -> str:
        """Add a vector of ones, unless the name exists."""
        if name not in self._initializers:
            self._initializers[name] = helper.make_tensor(name, ONNX_DTYPES[dtype], [size], [1.0] * size)
        return name

    @staticmethod
    def onnx_dtype(dtype: str) -> int:
        """Return ONNX's number of a dtype, for Cast."""
        return ONNX_DTYPES[dtype]

    def node(self, op: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        """Add a node with one output, which also names the node."""
        self.nodes(op, inputs, [output], **attributes)
        return output

    def has(self, name: str) -> bool:
        """Whether the graph has a node of this name."""
        return any(node.name == name for node in self._nodes)

    def nodes(self, op: str, inputs: Sequence[str], outputs: Sequence[str], **attributes: Any) -> None:
        self._nodes.append(helper.make_node(op, list(inputs), list(outputs), name=outputs[0], **attributes))

    def take(
        self,
        *,
        inputs: Iterable[onnx.ValueInfoProto] = (),
        nodes: Iterable[onnx.NodeProto] = (),
        initializers: Iterable[onnx.TensorProto] = (),
        outputs: Iterable[onnx.ValueInfoProto] = (),
    ) -> None:
        """Add parts of another graph as they are."""
        self._inputs.extend(inputs)
        self._nodes.extend(nodes)
        self._initializers |= {tensor.name: tensor for tensor in initializers}
        self._outputs.extend(outputs)

    def model(self) -> onnx.ModelProto:
        graph = helper.make_graph(
            self._nodes, self.name, self._inputs, self._outputs, initializer=list(self._initializers.values())
        )
        domains = sorted({node.domain for node in self._nodes if node.domain})
        imports = [helper.make_opsetid("", OPSET), *(helper.make_opsetid(domain, 1) for domain in domains)]
        return helper.make_model(graph, opset_imports=imports, ir_version=IR_VERSION, producer_name="trt-orchestrator")
