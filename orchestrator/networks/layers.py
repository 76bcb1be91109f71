"""Building blocks of the decoder: norms, linears, activations, embedding, MLP, collectives."""

from __future__ import annotations

from orchestrator.base.errors import ArchitectureError
from orchestrator.model.config_table import ACTIVATIONS, SWIGLU, XIELU
from orchestrator.networks.graph import GraphWriter
from orchestrator.networks.quantized import quantized_matmul
from orchestrator.networks.shape import RankShape


def rms_norm(
    graph: GraphWriter,
    shape: RankShape,
    x: str,
    weight: str,
    output: str,
    size: int | None = None,
    *,
    epsilon: float | None = None,
) -> str:
    """Add a root-mean-square norm over the last axis, accumulated in float32. `size` of the axis: hidden size by default.

    `epsilon`: the model's by default.

    Exact norms are also multiplied in float32, before the result is rounded to the graph's dtype.
    """
    epsilon = shape.config.norm_epsilon if epsilon is None else epsilon
    exact, attributes = shape.config.exact_norms, {"axis": -1, "epsilon": epsilon, "stash_type": 1}
    name, dtype = (f"{weight}_float32", "float32") if exact else (weight, shape.dtype)
    scale = graph.external(name, dtype, [size or shape.config.hidden_size])
    if not exact:
        return graph.node("RMSNormalization", [x, scale], output, **attributes)
    wide = graph.node("Cast", [x], f"{output}.wide", to=graph.onnx_dtype("float32"))
    normed = graph.node("RMSNormalization", [wide, scale], f"{output}.exact", **attributes)
    return graph.node("Cast", [normed], output, to=graph.onnx_dtype(shape.dtype))


def weightless_norm(graph: GraphWriter, shape: RankShape, x: str, output: str, size: int) -> str:
    """Add a root-mean-square norm over the last axis, of `size`, without a weight."""
    attributes = {"axis": -1, "epsilon": shape.config.norm_epsilon, "stash_type": 1}
    return graph.node("RMSNormalization", [x, graph.ones(f"ones_{size}.{shape.dtype}", size, shape.dtype)], output, **attributes)


def norm(graph: GraphWriter, shape: RankShape, x: str, prefix: str, output: str) -> str:
    """Add the model's norm of hidden states: RMSNorm or LayerNorm, the latter accumulated in float32 too."""
    config = shape.config
    if config.norm_kind == "rms":
        return rms_norm(graph, shape, x, f"{prefix}.weight", output)
    attributes = {"axis": -1, "epsilon": config.norm_epsilon, "stash_type": 1}
    exact, size = config.exact_norms, [config.hidden_size]
    name, dtype = (f"{prefix}.weight_float32", "float32") if exact else (f"{prefix}.weight", shape.dtype)
    inputs = [x, graph.external(name, dtype, size)]
    if config.norm_bias:
        inputs.append(graph.external(f"{prefix}.bias", shape.dtype, size))
    if not exact:
        return graph.node("LayerNormalization", inputs, output, **attributes)
    wide = [
        graph.node("Cast", [each], f"{output}.wide{number}", to=graph.onnx_dtype("float32"))
        for number, each in enumerate(inputs)
        if number != 1
    ]
    normed = graph.node("LayerNormalization", [wide[0], inputs[1], *wide[1:]], f"{output}.exact", **attributes)
    return graph.node("Cast", [normed], output, to=graph.onnx_dtype(shape.dtype))


def split_rms_norm(graph: GraphWriter, shape: RankShape, x: str, weight: str, output: str, size: int) -> str:
    """Add the norm of a vector that is split over the ranks, `size` elements on each, with the mean square over all ranks.

    A head that several ranks hold counts once per rank in the sum and in the number of elements, which leaves the mean unchanged.
    """
    wide = graph.node("Cast", [x], f"{output}.wide", to=graph.onnx_dtype("float32"))
    square = graph.node("Mul", [wide, wide], f"{output}.square")
    total = graph.node("ReduceSum", [square, graph.constant("axis_last", [-1])], f"{output}.sum", keepdims=1)
    mean = scale(graph, all_reduce(graph, shape, total), 1.0 / (size * shape.tp), f"{output}.mean", "float32")
    epsilon = graph.scalar("norm_epsilon", shape.config.norm_epsilon, "float32")
    root = graph.node("Sqrt", [graph.node("Add", [mean, epsilon], f"{output}.shifted")], f"{output}.root")
    normed = graph.node(
        "Cast", [graph.node("Div", [wide, root], f"{output}.normed")], f"{output}.cast", to=graph.onnx_dtype(shape.dtype)
    )
    return graph.node("Mul", [normed, graph.external(weight, shape.dtype, [size])], output)


def linear(
    graph: GraphWriter,
    shape: RankShape,
    x: str,
    prefix: str,
    size: tuple[int, int],
    *,
    bias: bool = False,
    dtype: str | None = None,
) -> str:
    """Add x @ weight^T (+ bias). `size`: (out, in), the checkpoint's layout. `dtype` of weight and bias: the graph's by default."""
    fmt = shape.format_of(prefix)
    if fmt is not None:
        product = quantized_matmul(graph, shape, x, prefix, size, fmt)
        return _add_bias(graph, shape, product, prefix, size[0]) if bias else product
    weight = graph.external(f"{prefix}.weight", dtype or shape.dtype, size)
    transposed = graph.node("Transpose", [weight], f"{prefix}.weight_t", perm=[1, 0])
    product = graph.node("MatMul", [x, transposed], f"{prefix}.matmul")
    return _add_bias(graph, shape, product, prefix, size[0], dtype) if bias else product


def row_linear(graph: GraphWriter, shape: RankShape, x: str, prefix: str, size: tuple[int, int], *, bias: bool = False) -> str:
    """Add a linear whose input features are split: sum the partial products over the ranks, then add the bias once."""
    product = all_reduce(graph, shape, linear(graph, shape, x, prefix, size))
    return _add_bias(graph, shape, product, prefix, size[0]) if bias else product


def _add_bias(graph: GraphWriter, shape: RankShape, x: str, prefix: str, size: int, dtype: str | None = None) -> str:
    return graph.node("Add", [x, graph.external(f"{prefix}.bias", dtype or shape.dtype, [size])], f"{prefix}.biased")


def scale(graph: GraphWriter, x: str, factor: float, output: str, dtype: str) -> str:
    """Add x * factor. Returns x when the factor is 1."""
    if factor == 1.0:
        return x
    return graph.node("Mul", [x, graph.scalar(f"factor.{factor!r}.{dtype}", factor, dtype)], output)


def soft_cap(graph: GraphWriter, x: str, cap: float | None, output: str, dtype: str) -> str:
    """Add cap * tanh(x / cap). Returns x without a cap."""
    if cap is None:
        return x
    small = scale(graph, x, 1.0 / cap, f"{output}.small", dtype)
    return scale(graph, graph.node("Tanh", [small], f"{output}.tanh"), cap, output, dtype)


def check_activation(name: str) -> None:
    """Check that an activation is supported. Raises ArchitectureError otherwise."""
    if name not in (*ACTIVATIONS, "relu2", XIELU, SWIGLU):
        raise ArchitectureError(f"activation {name!r} is not supported", f"Supported: {', '.join(ACTIVATIONS)}.")


def activate(graph: GraphWriter, shape: RankShape, x: str, output: str) -> str:
    """Add the model's activation."""
    if shape.config.hidden_act in ("silu", "swish", SWIGLU):
        return graph.node("Mul", [x, graph.node("Sigmoid", [x], f"{output}.sigmoid")], output)
    if shape.config.hidden_act == "relu2":
        positive = graph.node("Relu", [x], f"{output}.positive")
        return graph.node("Mul", [positive, positive], output)
    kind = "none" if shape.config.hidden_act == "gelu" else "tanh"
    return graph.node("Gelu", [x], output, approximate=kind)


def learned_xielu(graph: GraphWriter, shape: RankShape, x: str, output: str) -> str:
    """Add xIELU (arXiv 2411.13010), a parabola above zero and an exponential below, computed in float32:

    p * x^2 + beta * x for x > 0, else n * (exp(min(x, eps)) - 1 - x) + beta * x, with p = softplus(alpha_p) and
    n = beta + softplus(alpha_n). Each layer has its own numbers, [1].
    """
    prefix = output.removesuffix(".activated")
    alpha_p, alpha_n, beta, eps = (
        graph.external(f"{prefix}.act.{name}", "float32", [1]) for name in ("alpha_p", "alpha_n", "beta", "eps")
    )
    wide = graph.node("Cast", [x], f"{output}.wide", to=graph.onnx_dtype("float32"))
    line = graph.node("Mul", [wide, beta], f"{output}.line")
    above = graph.node("Softplus", [alpha_p], f"{output}.above")
    parabola = graph.node("Mul", [graph.node("Mul", [wide, wide], f"{output}.square"), above], f"{output}.parabola")
    power = graph.node("Exp", [graph.node("Min", [wide, eps], f"{output}.low")], f"{output}.exp")
    decay = graph.node("Sub", [power, graph.scalar("one.float32", 1.0, "float32")], f"{output}.decay")
    below = graph.node("Add", [graph.node("Softplus", [alpha_n], f"{output}.steep"), beta], f"{output}.below")
    curve = graph.node("Mul", [graph.node("Sub", [decay, wide], f"{output}.bent"), below], f"{output}.curve")
    is_above = graph.node("Greater", [wide, graph.scalar("zero.float32", 0.0, "float32")], f"{output}.is_above")
    chosen = graph.node("Where", [is_above, parabola, curve], f"{output}.chosen")
    return graph.node("Cast", [graph.node("Add", [chosen, line], f"{output}.sum")], output, to=graph.onnx_dtype(shape.dtype))


def all_reduce(graph: GraphWriter, shape: RankShape, x: str) -> str:
    """Add a sum over the tensor-parallel ranks."""
    return x if shape.tp == 1 else _collective(graph, shape, x, "all_reduce", "sum")


def all_gather(graph: GraphWriter, shape: RankShape, x: str) -> str:
    """Add a concatenation over the tensor-parallel ranks along axis 0."""
    return x if shape.tp == 1 else _collective(graph, shape, x, "all_gather", "none")


def embedding(graph: GraphWriter, shape: RankShape, ids: str) -> str:
    """Add the embedding, [batch, tokens, hidden], from a table that is whole, or split by vocabulary or hidden size."""
    config, name = shape.config, "transformer.vocab_embedding.weight"
    if not config.use_parallel_embedding or shape.tp == 1:
        return graph.node(
            "Gather", [graph.external(name, shape.dtype, [config.vocab_size, config.hidden_size]), ids], "embedding", axis=0
        )
    if config.embedding_sharding_dim == 1:
        table = graph.external(name, shape.dtype, [config.vocab_size, config.hidden_size // shape.tp])
        local = graph.node("Gather", [table, ids], "embedding.local", axis=0)
        # Collectives concatenate along axis 0, so the hidden axis is moved there and back.
        first = graph.node("Transpose", [local], "embedding.hidden_first", perm=[2, 0, 1])
        return graph.node("Transpose", [all_gather(graph, shape, first)], "embedding", perm=[1, 2, 0])
    return _embedding_by_vocabulary(graph, shape, ids, name)


def _embedding_by_vocabulary(graph: GraphWriter, shape: RankShape, ids: str, name: str) -> str:
    """Look up the ids of each rank's rows, with zeros for all other ids, and sum over the ranks."""
    rows = shape.config.padded_vocab_size(shape.tp) // shape.tp
    table = graph.external(name, shape.dtype, [rows, shape.config.hidden_size])
    first = graph.constant("vocab_first", shape.tp_rank * rows)
    last = graph.constant("vocab_last", (shape.tp_rank + 1) * rows)
    above = graph.node("GreaterOrEqual", [ids, first], "embedding.above")
    mine = graph.node("And", [above, graph.node("Less", [ids, last], "embedding.below")], "embedding.mine")
    local = graph.node(
        "Where", [mine, graph.node("Sub", [ids, first], "embedding.shifted"), graph.constant("zero", 0)], "embedding.ids"
    )
    found = graph.node("Gather", [table, local], "embedding.rows", axis=0)
    chosen = graph.node("Unsqueeze", [mine, graph.constant("axis_2", [2])], "embedding.chosen")
    nothing = graph.scalar(f"nothing.{shape.dtype}", 0.0, shape.dtype)
    return all_reduce(graph, shape, graph.node("Where", [chosen, found, nothing], "embedding.partial"))


def _collective(graph: GraphWriter, shape: RankShape, x: str, operation: str, reduce: str) -> str:
    return graph.node(
        "DistCollective", [x], f"{x}.{operation}",
        collective_operation=operation, reduce_op=reduce, root=-1, nb_rank=shape.tp, group_size=0,
    )  # fmt: skip


def gated_mlp(graph: GraphWriter, shape: RankShape, x: str, prefix: str) -> str:
    """Add proj(act(fc(x)) * gate(x)). fc is Hugging Face's gate_proj, gate its up_proj. With swiglu, fc joins both, up first.

    Without a gate, fc is Hugging Face's up_proj.
    """
    config = shape.config
    local = config.intermediate_size // shape.tp
    if config.hidden_act == SWIGLU:
        both = linear(graph, shape, x, f"{prefix}.fc", (2 * local, config.hidden_size), bias=config.mlp_bias)
        product = gated_halves(graph, shape, both, prefix, local)
    else:
        fc = linear(graph, shape, x, f"{prefix}.fc", (local, config.hidden_size), bias=config.mlp_bias)
        act = learned_xielu if config.hidden_act == XIELU else activate
        product = act(graph, shape, fc, f"{prefix}.activated")
        if config.mlp_gated:
            gate = linear(graph, shape, x, f"{prefix}.gate", (local, config.hidden_size), bias=config.mlp_bias)
            product = graph.node("Mul", [product, gate], f"{prefix}.product")
    return row_linear(graph, shape, product, f"{prefix}.proj", (config.hidden_size, local), bias=config.mlp_bias)


def gated_halves(graph: GraphWriter, shape: RankShape, both: str, prefix: str, width: int) -> str:
    """Add act(gate) * up. `up` is the first half of `both`."""
    up, gate = f"{prefix}.up", f"{prefix}.gate"
    graph.nodes("Split", [both, graph.constant(f"halves_{width}", [width, width])], [up, gate], axis=-1)
    return graph.node("Mul", [activate(graph, shape, gate, f"{prefix}.activated"), up], f"{prefix}.product")
