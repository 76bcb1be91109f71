"""Rotary embedding in the graph: tables bound by name, with rows chosen by position_ids.

Two kinds of scaling depend on the length of a text. As in transformers, the length of a sequence is its highest position in the
call, plus one. Keys that are already in the KV cache keep their rotation.

    longrope    two tables in one tensor: first for texts within the trained length, then for longer texts
    dynamic     frequencies computed in the graph: plain within the trained length, lower for longer texts
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from orchestrator.model.config import ModelConfig
from orchestrator.model.stage import StageNetwork
from orchestrator.networks.graph import GraphWriter
from orchestrator.networks.rotary import inverse_frequencies

Table = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Rotary:
    """Inputs of RotaryEmbedding in the layers of a graph."""

    everywhere: tuple[str, ...]
    """Inputs after the queries or keys: cos, sin and, for tables, their rows."""
    windowed: tuple[str, ...]
    """Inputs in layers with a window, which may have another base."""
    tables: dict[str, Table]
    """Name of the initializer -> table."""


def rotary_tables(config: ModelConfig, length: int, *, local: bool = False) -> tuple[Table, Table]:
    """Return cos and sin of positions 0..length-1, [length, rotary_dim / 2].

    If frequencies depend on the length and `length` exceeds the trained length: [2 x length, rotary_dim / 2], first the rows for
    texts within the trained length, then for longer texts. `local`: the tables of the layers with a window.
    """
    regimes = [length]
    if not local and config.rotary_depends_on_length(length):
        regimes = [config.trained_length, length]
    frequencies = [inverse_frequencies(config, regime, local=local) for regime in regimes]
    angles = np.arange(length, dtype=np.float32)
    cos = [np.cos(np.outer(angles, each)) * factor for each, factor in frequencies]
    sin = [np.sin(np.outer(angles, each)) * factor for each, factor in frequencies]
    return np.concatenate(cos).astype(np.float32), np.concatenate(sin).astype(np.float32)


def rotary(graph: GraphWriter, network: StageNetwork, dtype: str) -> Rotary:
    """Add the rotary inputs of the layers of a stage. The graph must already have the input `position_ids`."""
    stage = network.stage
    config = stage.config
    own_base = config.rotary_base_local is not None
    windowed = [own_base and config.has_window(stage.first_layer + layer) for layer in range(stage.num_layers)]
    tables: dict[str, Table] = {}
    everywhere: tuple[str, ...] = ()
    if not any(config.has_rotary(stage.first_layer + layer) for layer in range(stage.num_layers)):
        return Rotary((), (), tables)
    if not all(windowed):
        if _is_dynamic(network):
            everywhere = _computed(graph, config, dtype)
        else:
            everywhere = _bound(graph, network, dtype, "rotary", tables, local=False)
    local = _bound(graph, network, dtype, "rotary_local", tables, local=True) if any(windowed) else everywhere
    return Rotary(everywhere, local, tables)


def query_scale(graph: GraphWriter, network: StageNetwork, dtype: str) -> str | None:
    """Add the factor of the queries by position, [batch, 1, tokens, 1], computed in float32; None: it is one for every position."""
    stage = network.stage
    config, floor, positions = stage.config, stage.config.query_scale_floor, "position_ids"
    length = config.trained_length if floor is None else floor
    if config.query_scale_beta is None or network.max_seq_len < length + (floor is None):
        return None
    if not any(config.scales_queries(stage.first_layer + layer) for layer in range(stage.num_layers)):
        return None
    if floor is not None:
        positions = graph.node("Add", [positions, graph.constant("one", 1)], "query_scale.counted")
    spans = graph.node("Div", [positions, graph.constant("query_scale.length", length)], "query_scale.spans")
    wide = graph.node("Cast", [spans], "query_scale.spans_wide", to=graph.onnx_dtype("float32"))
    one = graph.scalar("query_scale.one", 1.0, "float32")
    grown = graph.node("Log", [graph.node("Add", [wide, one], "query_scale.shifted")], "query_scale.log")
    beta = graph.scalar("query_scale.beta", config.query_scale_beta, "float32")
    factor = graph.node("Add", [graph.node("Mul", [grown, beta], "query_scale.grown"), one], "query_scale.by_token")
    narrow = graph.node("Cast", [factor], "query_scale.cast", to=graph.onnx_dtype(dtype))
    return graph.node("Unsqueeze", [narrow, graph.constant("axes_1_3", [1, 3])], "query_scale")


def _is_dynamic(network: StageNetwork) -> bool:
    config = network.stage.config
    kind = (config.rotary_scaling or {}).get("rope_type")
    return kind == "dynamic" and config.rotary_depends_on_length(network.max_seq_len)


def _bound(
    graph: GraphWriter, network: StageNetwork, dtype: str, prefix: str, tables: dict[str, Table], *, local: bool
) -> tuple[str, ...]:
    """Add cos and sin as bound tables, and the row of each token."""
    config = network.stage.config
    for name, table in zip(("cos", "sin"), rotary_tables(config, network.max_seq_len, local=local), strict=True):
        tables[graph.external(f"{prefix}_{name}", dtype, table.shape)] = table
    rows = "position_ids"
    if len(tables[f"{prefix}_cos"]) > network.max_seq_len:
        rows = _rows(graph, config.trained_length, network.max_seq_len)
    return f"{prefix}_cos", f"{prefix}_sin", rows


def _text_length(graph: GraphWriter) -> str:
    """Add the length of each sequence up to this call, [batch, 1]."""
    last = graph.node("ReduceMax", ["position_ids", graph.constant("axis_1", [1])], "position_ids.last", keepdims=1)
    return graph.node("Add", [last, graph.constant("one", 1)], "text_length")


def _rows(graph: GraphWriter, trained: int, length: int) -> str:
    """Add the rows of a table with two parts: the positions, shifted to the second part for texts beyond the trained length."""
    long = graph.node("Greater", [_text_length(graph), graph.constant("trained_length", trained)], "text_length.is_long")
    offset = graph.node("Where", [long, graph.constant("rows_long", length), graph.constant("zero", 0)], "rotary_rows.offset")
    return graph.node("Add", ["position_ids", offset], "rotary_rows")


def _computed(graph: GraphWriter, config: ModelConfig, dtype: str) -> tuple[str, ...]:
    """Add cos and sin [batch, tokens, rotary_dim / 2] of dynamic scaling, computed in float32.

    base' = base * (factor * length / trained - (factor - 1)) ** (dim / (dim - 2)), with length at least trained. With alpha
    (Hunyuan), base' = base * alpha ** (dim / (dim - 2)) within the trained length.
    """
    assert config.rotary_scaling is not None
    dim = config.rotary_embedding_dim or config.head_size
    trained, factor = float(config.trained_length), float(config.rotary_scaling["factor"])

    def number(name: str, value: float) -> str:
        return graph.scalar(f"rotary.{name}", value, "float32")

    length = graph.node("Cast", [_text_length(graph)], "text_length.float", to=graph.onnx_dtype("float32"))
    bounded = graph.node("Max", [length, number("trained", trained)], "text_length.bounded")
    stretched = graph.node("Mul", [bounded, number("stretch", factor / trained)], "rotary.stretched")
    ratio = graph.node("Sub", [stretched, number("shift", factor - 1.0)], "rotary.ratio")
    if "alpha" in config.rotary_scaling:
        is_long = graph.node("Greater", [length, number("trained", trained)], "text_length.is_beyond")
        alpha = number("alpha", float(config.rotary_scaling["alpha"]))
        ratio = graph.node("Where", [is_long, ratio, alpha], "rotary.ratio_or_alpha")
    power = graph.node("Pow", [ratio, number("exponent", dim / (dim - 2))], "rotary.power")
    base = graph.node("Mul", [power, number("base", config.rotary_base)], "rotary.grown_base")
    exponents = graph.floats("rotary.exponents", (np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)))
    inverse = graph.node("Reciprocal", [graph.node("Pow", [base, exponents], "rotary.wave")], "rotary.frequencies")
    by_token = graph.node("Unsqueeze", [inverse, graph.constant("axis_1", [1])], "rotary.frequencies_3d")
    positions = graph.node("Cast", ["position_ids"], "rotary.positions", to=graph.onnx_dtype("float32"))
    column = graph.node("Unsqueeze", [positions, graph.constant("axis_2", [2])], "rotary.positions_3d")
    angles = graph.node("Mul", [column, by_token], "rotary.angles")
    cos, sin = (graph.node(op, [angles], f"rotary.{op.lower()}_wide") for op in ("Cos", "Sin"))
    return tuple(graph.node("Cast", [wide], wide.removesuffix("_wide"), to=graph.onnx_dtype(dtype)) for wide in (cos, sin))
