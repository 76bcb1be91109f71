"""Planning of a build from a spec: read the source's headers, resolve the model and its layout, lay out the steps."""

from __future__ import annotations

from dataclasses import replace

from orchestrator.base.dtypes import MODEL_DTYPE_NAMES, MODEL_DTYPES, num_bytes
from orchestrator.base.errors import ArchitectureError, QuantizationError, SpecError, TopologyError
from orchestrator.checkpoints import read_source, tokenizer_files
from orchestrator.families import check_kind, family_named, find
from orchestrator.families.nearest import nearest, unsupported
from orchestrator.families.wrappers import architecture_of
from orchestrator.model import topology as topologies
from orchestrator.model.checkpoint import CheckpointIndex
from orchestrator.model.config import ModelConfig
from orchestrator.model.config_hugging_face import from_hugging_face
from orchestrator.model.config_keys import config_warnings
from orchestrator.model.quantization import check_cache, check_portable
from orchestrator.model.rules import Family
from orchestrator.model.weight_map import weight_map
from orchestrator.model.weight_names import check_names
from orchestrator.planning.plan import Inputs, Plan, make_plan
from orchestrator.spec.build import SOURCE, BuildSpec
from orchestrator.stores.hub import pinned


def plan(spec: BuildSpec) -> Plan:
    """Make the plan of a build from headers alone.

    Raises the source's errors, ArchitectureError, TopologyError with the legal topologies, WeightMapError, SpecError.
    """
    topologies.check_engines(spec.topology.topology())
    return plan_conversion(spec)


def plan_conversion(spec: BuildSpec) -> Plan:
    """Make a plan whose conversion can run, whether or not engines support its topology. Raises as `plan` does."""
    from orchestrator.engines import installed_version
    from orchestrator.engines.profiles import resolved
    from orchestrator.planning.quantization import resolve as resolve_quantization
    from orchestrator.planning.quantization import resolve_stored
    from orchestrator.quantizers.resolve import tolerance

    places = {"path": pinned(spec.source.path), "tokenizer": spec.source.tokenizer and pinned(spec.source.tokenizer)}
    spec = spec.model_copy(update={"source": spec.source.model_copy(update=places)})
    index, extra_files = read_source(spec.source.path, spec.source.format)
    if spec.source.tokenizer is not None:
        extra_files = tokenizer_files(spec.source.tokenizer)
    family, architecture, ignored = _family(spec, index)
    config = from_hugging_face(index.config, architecture, source_dtype(spec.dtype, index), family.config, ignored)
    index = index.dequantized_to(MODEL_DTYPES[config.dtype])
    index = replace(index, warnings=(*index.warnings, *config_warnings(index.config, architecture, family.config)))
    topology = spec.topology.topology()
    topologies.check(topology, config.limits())
    config = _with_layout(config, spec)
    check_names(family, config, topology)
    engine = resolved(config, spec.engine)
    quantization = None
    if spec.quantization is not None and spec.quantization.algorithm == SOURCE:
        dense = weight_map(index, family, config, topology, spec.conversion.max_shard_bytes)
        quantization = resolve_stored(spec.quantization, index, dense, config.num_hidden_layers)
    elif spec.quantization is not None:
        quantization = resolve_quantization(spec.quantization, config.num_hidden_layers)
    model = quantization.model if quantization else None
    check_cache(model, is_latent=config.is_latent)
    if "portable" in spec.release.include:
        check_portable(model, has_equal_caches=not config.global_head_size)
    weights = weight_map(index, family, config, topology, spec.conversion.max_shard_bytes, model)
    version = installed_version(spec.engine.backend)
    inputs = Inputs(
        index,
        extra_files,
        spec.source.path,
        config,
        weights,
        version,
        engine,
        quantization,
        tolerance(model),
        family=family.name,
        ignored_keys=ignored,
        tokenizer=spec.source.tokenizer,
    )
    return make_plan(spec, inputs)


def _with_layout(config: ModelConfig, spec: BuildSpec) -> ModelConfig:
    """Return the config with the spec's layout. Raises TopologyError when tp does not divide the hidden size."""
    conversion = spec.conversion
    if conversion.use_parallel_embedding and conversion.embedding_sharding_dim == 1 and config.hidden_size % spec.topology.tp:
        legal = [tp for tp in topologies.legal_tp(config.limits(), spec.topology.moe_ep) if config.hidden_size % tp == 0]
        raise TopologyError(
            f"tp={spec.topology.tp} does not divide hidden_size {config.hidden_size}, by which the embedding is split",
            f"Use embedding_sharding_dim: 0, or tp in {topologies.as_set(legal)}.",
        )
    layout = {
        "use_parallel_embedding": conversion.use_parallel_embedding,
        "embedding_sharding_dim": conversion.embedding_sharding_dim,
    }
    return config.model_copy(update=layout)


def _family(spec: BuildSpec, index: CheckpointIndex) -> tuple[Family, str, frozenset[str]]:
    """Return the family, the architecture, and the keys of config.json to ignore."""
    ignored = frozenset(spec.source.ignored_keys)
    family: Family | None
    if spec.source.family != "auto":
        family = family_named(spec.source.family)
        check_kind(index.config, family, spec.source.path)
        listed = index.config.get("architectures")
        named = listed[0] if isinstance(listed, list) and listed and isinstance(listed[0], str) else None
        return family, named or family.architectures[0], ignored | {"model_type"}
    architecture = architecture_of(index.config, spec.source.path)
    if architecture is None:
        raise ArchitectureError(f"config.json of {spec.source.path} names no architecture", "Set source.family in the spec.")
    family = find(architecture)
    if family is None:
        raise unsupported(architecture, nearest(architecture, index.config, index.tensors)[0])
    return family, architecture, ignored


def source_dtype(asked: str, index: CheckpointIndex) -> str:
    """Return the model's dtype: `asked`, or for auto the dtype of most bytes of the source, with float16 for float32.

    Raises SpecError for a dtype that no model may have. Raises QuantizationError if most bytes are not floating-point numbers of
    16 bits or more.
    """
    if asked != "auto" and asked not in MODEL_DTYPES:
        raise SpecError(f"{asked!r} is not a model dtype", f"Model dtypes: auto, {', '.join(MODEL_DTYPES)}.")
    sizes: dict[str, int] = {}
    for tensor in index.tensors.values():
        dtype = tensor.stored_dtype
        sizes[dtype] = sizes.get(dtype, 0) + num_bytes(dtype, tensor.num_elements)
    dominant = max(sizes, key=lambda name: sizes[name], default="")
    if dominant and dominant not in (*MODEL_DTYPE_NAMES, "F64"):
        raise QuantizationError(
            f"most of the source's bytes are {dominant}: it is quantized, although config.json does not mention it",
            "Build from the unquantized checkpoint.",
        )
    if asked != "auto":
        return asked
    if dominant not in MODEL_DTYPE_NAMES:
        raise SpecError(
            f"the source's dtype {dominant or 'none'} is not a model dtype", "Set dtype: bfloat16 or float16 in the spec."
        )
    name = MODEL_DTYPE_NAMES[dominant]
    return "float16" if name == "float32" else name
