"""Strict decoding of what a quantized source says about itself: `quantization_config`, or a file that its tool left beside it.

Every key must be known here, because a key that is skipped may change what the stored numbers mean.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from orchestrator.base.errors import QuantizationError, abbreviated

_ADVICE = "Build from the unquantized checkpoint, or dequantize this one with the tool that wrote it."


@dataclass(frozen=True, slots=True)
class WeightArgs:
    """Format of the weights of a group of modules."""

    bits: int = 8
    is_float: bool = True
    symmetric: bool = True
    group_size: int | None = None
    """Input features per scale; None: by the scale's shape; -1: all of a row."""
    block: tuple[int, int] | None = None
    """Rows and columns per scale; None: not in two dimensions."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """A source's own description of its weights."""

    method: str
    """quant_method."""
    algorithm: str
    """Format, for people: FP8 128x128, INT4 group 32."""
    args: WeightArgs = field(default_factory=WeightArgs)
    groups: tuple[tuple[tuple[str, ...], WeightArgs], ...] = ()
    """compressed-tensors: targets and their format. Targets that are no regular expression or name stand for classes of modules."""
    ignored: tuple[str, ...] = ()
    matches: Callable[[str, str], bool] = lambda module, pattern: module == pattern
    """Whether a pattern of `ignored` names a module."""
    activation_order: bool = False
    """GPTQ: groups are by g_idx."""
    zero_offset: int = 0
    """GPTQ: number to add to every stored zero point."""
    activation_limit: float | None = None
    """FBGEMM: bound of activations."""
    algorithms: frozenset[str] = frozenset()
    """Model Optimizer: the algorithms that occur."""

    def ignores(self, module: str) -> bool:
        return any(self.matches(module, pattern) for pattern in self.ignored)

    def args_of(self, module: str) -> WeightArgs:
        """Return the format of a module's weight: of the group that names it, else of the first that names a class."""
        for targets, args in self.groups:
            if any(_matches_compressed(module, target) for target in targets):
                return args
        classes = [args for targets, args in self.groups if any(not target.startswith("re:") for target in targets)]
        return classes[0] if classes else self.args


def decode_recipe(method: str, found: Mapping[str, Any], where: str) -> Recipe:
    """Decode a description. `where` names its file. Raises QuantizationError for what is unknown or not supported."""
    return _METHODS[method](found, where)


def _check_keys(found: Mapping[str, Any], known: str, where: str) -> None:
    unknown = sorted(found.keys() - set(known.split()))
    if unknown:
        shown = ", ".join(f"{name}: {abbreviated(repr(found[name]), 60)}" for name in unknown[:5])
        raise QuantizationError(f"{where}: unknown keys of the quantization: {shown}", _ADVICE)


def _refuse(where: str, what: str, advice: str = _ADVICE) -> QuantizationError:
    return QuantizationError(f"{where}: {what}", advice)


def _names(found: Mapping[str, Any], where: str, *keys: str) -> tuple[str, ...]:
    """Return the list under the first of `keys` that is present and not null."""
    for key in keys:
        value = found.get(key)
        if value is None:
            continue
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise _refuse(where, f"{key} is not a list of names")
        return tuple(value)
    return ()


def _whole(found: Mapping[str, Any], key: str, default: int, where: str) -> int:
    value = found.get(key, default)
    if type(value) is not int or value == 0 or value < -1:
        raise _refuse(where, f"{key} is {abbreviated(repr(value), 40)}, not a number of elements")
    return value


def _one_of(found: Mapping[str, Any], key: str, default: Any, allowed: tuple[Any, ...], where: str) -> Any:
    value = found.get(key, default)
    value = value.lower() if isinstance(value, str) else value
    if value not in allowed:
        raise _refuse(where, f"{key} is {abbreviated(repr(value), 40)}; read are {', '.join(map(repr, allowed))}")
    return value


def _matches_transformers(module: str, pattern: str) -> bool:
    """`should_convert_module` of transformers."""
    try:
        return bool(re.match(pattern, module)) or module.endswith(pattern)
    except re.error:
        return module.endswith(pattern)


def _matches_compressed(module: str, pattern: str) -> bool:
    """`match_name` of compressed-tensors."""
    if pattern.startswith("re:"):
        try:
            return bool(re.match(pattern[3:], module))
        except re.error as error:
            raise QuantizationError(f"quantization_config: {pattern!r} is not a regular expression: {error}", _ADVICE) from None
    return module == pattern


def _block(value: Any, where: str) -> tuple[int, int]:
    if not isinstance(value, list) or len(value) != 2 or not all(type(size) is int and size > 0 for size in value):
        raise _refuse(where, f"the size of a block is {abbreviated(repr(value), 40)}, not two numbers")
    return value[0], value[1]


def _fp8(found: Mapping[str, Any], where: str) -> Recipe:
    known = (
        "quant_method activation_scheme fmt weight_block_size modules_to_not_convert ignored_layers dequantize scale_fmt "
        "kv_cache_scheme"
    )
    _check_keys(found, known, where)
    _one_of(found, "activation_scheme", "dynamic", ("dynamic", "static"), where)
    _one_of(found, "fmt", "e4m3", ("e4m3", "float8_e4m3fn"), where)
    _one_of(found, "scale_fmt", "float", ("float", "ue8m0", None), where)
    size = found.get("weight_block_size")
    block = None if size is None else _block(size, where)
    name = "FP8 per tensor" if block is None else f"FP8 {block[0]}x{block[1]}"
    ignored = _names(found, where, "modules_to_not_convert", "ignored_layers")
    return Recipe("fp8", name, WeightArgs(block=block), ignored=ignored, matches=_matches_transformers)


def _fbgemm(found: Mapping[str, Any], where: str) -> Recipe:
    _check_keys(found, "quant_method activation_scale_ub modules_to_not_convert", where)
    limit = found.get("activation_scale_ub", 1200.0)
    if not isinstance(limit, int | float) or isinstance(limit, bool) or not limit > 0:
        raise _refuse(where, f"activation_scale_ub is {abbreviated(repr(limit), 40)}, not a number")
    return Recipe(
        "fbgemm_fp8",
        "FP8 per row",
        WeightArgs(group_size=-1),
        ignored=_names(found, where, "modules_to_not_convert"),
        matches=_matches_transformers,
        activation_limit=float(limit),
    )


def _mxfp4(found: Mapping[str, Any], where: str) -> Recipe:
    _check_keys(found, "quant_method modules_to_not_convert dequantize", where)
    ignored = _names(found, where, "modules_to_not_convert")
    return Recipe("mxfp4", "MXFP4", WeightArgs(bits=4, group_size=32), ignored=ignored, matches=_matches_transformers)


def _awq(found: Mapping[str, Any], where: str) -> Recipe:
    known = (
        "quant_method bits w_bit group_size q_group_size version zero_point modules_to_not_convert backend do_fuse "
        "fuse_max_seq_len modules_to_fuse exllama_config"
    )
    _check_keys(found, known, where)
    _one_of(found, "bits" if "bits" in found else "w_bit", 4, (4,), where)
    _one_of(found, "version", "gemm", ("gemm",), where)
    _one_of(found, "zero_point", True, (True,), where)
    size = _whole(found, "group_size" if "group_size" in found else "q_group_size", 128, where)
    ignored = _names(found, where, "modules_to_not_convert")
    args = WeightArgs(bits=4, is_float=False, symmetric=False, group_size=size)
    return Recipe("awq", f"INT4 group {size} (AWQ)", args, ignored=ignored, matches=_matches_transformers)


def _gptq(found: Mapping[str, Any], where: str) -> Recipe:
    known = (
        "quant_method bits group_size desc_act sym damp_percent damp_auto_increment static_groups true_sequential act_group_aware "
        "checkpoint_format format model_name_or_path model_file_base_name is_marlin_format meta lm_head tokenizer dataset "
        "block_name_to_quantize module_name_preceding_first_block modules_in_block_to_quantize batch_size pad_token_id "
        "max_input_length cache_block_outputs use_cuda_fp16 model_seqlen use_exllama exllama_config disable_exllama "
        "quantization_dataset pack_dtype mse backend modules_to_not_convert"
    )
    _check_keys(found, known, where)
    bits = _one_of(found, "bits", 4, (4, 8), where)
    _one_of(found, "is_marlin_format", False, (False, None), where)
    _one_of(found, "pack_dtype", "int32", ("int32", None), where)
    layout = _one_of(found, "checkpoint_format" if found.get("checkpoint_format") else "format", "gptq", ("gptq", "gptq_v2"), where)
    size = _whole(found, "group_size", 128, where)
    args = WeightArgs(bits=bits, is_float=False, symmetric=False, group_size=size)
    return Recipe(
        "gptq",
        f"INT{bits} group {size} (GPTQ)",
        args,
        ignored=_names(found, where, "modules_to_not_convert"),
        matches=_matches_transformers,
        activation_order=bool(found.get("desc_act")),
        zero_offset=1 if layout == "gptq" else 0,
    )


_WEIGHT_KEYS = (
    "num_bits type symmetric group_size strategy block_structure dynamic actorder scale_dtype zp_dtype observer observer_kwargs"
)
_COMPRESSED_FORMATS = (
    "pack-quantized", "float-quantized", "int-quantized", "naive-quantized", "nvfp4-pack-quantized", "mxfp4-pack-quantized",
    "mxfp8-quantized", "mixed-precision", "dense", None,
)  # fmt: skip


def _compressed(found: Mapping[str, Any], where: str) -> Recipe:
    known = (
        "quant_method config_groups format ignore kv_cache_scheme quantization_status global_compression_ratio sparsity_config "
        "transform_config version run_compressed moe_sparsity_config"
    )
    _check_keys(found, known, where)
    _one_of(found, "format", None, _COMPRESSED_FORMATS, where)
    _one_of(found, "quantization_status", "compressed", ("compressed", "frozen"), where)
    for key in ("sparsity_config", "transform_config"):
        if found.get(key):
            raise _refuse(where, f"{key}: {abbreviated(repr(found[key]), 80)} is not read")
    plain = found.get("config_groups")
    if not isinstance(plain, dict) or not all(isinstance(group, dict) for group in plain.values()) or not plain:
        raise _refuse(where, "config_groups is missing, or holds groups that are no objects")
    groups = tuple(_compressed_group(group, f"{where}: config_groups.{name}") for name, group in plain.items())
    names = sorted({_compressed_name(args) for _, args in groups})
    ignored = _names(found, where, "ignore")
    return Recipe("compressed-tensors", ", ".join(names), groups=groups, ignored=ignored, matches=_matches_compressed)


def _compressed_group(group: Mapping[str, Any], where: str) -> tuple[tuple[str, ...], WeightArgs]:
    _check_keys(group, "targets weights input_activations output_activations format", where)
    _one_of(group, "format", None, _COMPRESSED_FORMATS, where)
    weights = group.get("weights")
    if not isinstance(weights, dict):
        raise _refuse(where, "weights is missing")
    _check_keys(weights, _WEIGHT_KEYS, f"{where}.weights")
    bits = _one_of(weights, "num_bits", 8, (4, 8), where)
    kind = _one_of(weights, "type", "int", ("int", "float"), where)
    strategy = _one_of(weights, "strategy", None, ("tensor", "channel", "group", "block", "tensor_group", None), where)
    _one_of(weights, "actorder", None, (None, "weight", "static", False), where)
    size = None if weights.get("group_size") is None else _whole(weights, "group_size", 0, where)
    block = _block(weights.get("block_structure"), where) if strategy == "block" else None
    group_size = {"tensor": None, "channel": -1, "block": None}.get(strategy, size)
    symmetric = bool(weights.get("symmetric", True))
    return _names(group, where, "targets"), WeightArgs(bits, kind == "float", symmetric, group_size, block)


def _compressed_name(args: WeightArgs) -> str:
    kind = ("FP" if args.is_float else "INT") + str(args.bits)
    size = {None: "", -1: " per row"}.get(args.group_size, f" group {args.group_size}")
    return kind + (f" {args.block[0]}x{args.block[1]}" if args.block else size)


MODELOPT_ALGORITHMS = (
    "FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO", "NVFP4", "NVFP4_AWQ", "W4A16_NVFP4", "W4A16_AWQ", "W8A16",
    "W8A8_SQ_PER_CHANNEL", "MXFP8",
)  # fmt: skip
"""Values of quant_algo that are read."""


def _modelopt(found: Mapping[str, Any], where: str) -> Recipe:
    """Decode config.json's block, or hf_quant_config.json, which holds the same under `quantization`."""
    if isinstance(found.get("quantization"), dict):
        _check_keys(found, "producer quantization quant_method", where)
        found = found["quantization"]
    known = (
        "quant_method quant_algo kv_cache_quant_algo kv_cache_scheme group_size exclude_modules ignore has_zero_point "
        "pre_quant_scale quantized_layers config_groups producer"
    )
    _check_keys(found, known, where)
    layers = found.get("quantized_layers") or {}
    algorithm = found.get("quant_algo")
    if not isinstance(layers, dict) or not all(isinstance(layer, dict) for layer in layers.values()):
        raise _refuse(where, "quantized_layers is not a list of layers by name")
    named = [layer.get("quant_algo") for layer in layers.values()]
    algorithms = named if algorithm == "MIXED_PRECISION" else [algorithm]
    for name in algorithms:
        if not isinstance(name, str) or name.upper() not in MODELOPT_ALGORITHMS:
            raise _refuse(where, f"quant_algo is {abbreviated(repr(name), 40)}; read are {', '.join(MODELOPT_ALGORITHMS)}")
    if found.get("has_zero_point"):
        raise _refuse(where, "has_zero_point: weights with zero points are not read")
    return Recipe(
        "modelopt",
        f"{algorithm} (Model Optimizer)",
        ignored=_names(found, where, "exclude_modules", "ignore"),
        matches=fnmatch.fnmatchcase,
        algorithms=frozenset(name.upper() for name in algorithms if isinstance(name, str)),
    )


_METHODS: dict[str, Callable[[Mapping[str, Any], str], Recipe]] = {
    "fp8": _fp8,
    "fbgemm_fp8": _fbgemm,
    "mxfp4": _mxfp4,
    "awq": _awq,
    "gptq": _gptq,
    "compressed-tensors": _compressed,
    "modelopt": _modelopt,
}
READ = tuple(_METHODS)
"""Values of quant_method that are read."""
