"""Keys of config.json: known keys with typed values, and keys that do not matter, with the reason.

Unknown keys are refused by name, because they may change what the model computes. To allow a key, find out what it does. Then
list it in DOES_NOT_MATTER with its reason, or in MUST_BE with its only supported value, or give it a meaning in a family.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from orchestrator.base.errors import ArchitectureError, abbreviated
from orchestrator.model.config_table import ConfigTable

ROTARY_KEYS = ("rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings")
"""Keys of the rotary embedding in every family. config_rotary reads them and holds their defaults."""
REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
"""Required keys: the sizes of the model. transformers has defaults for them, but a config.json without them is incomplete."""
_MOST = {
    "num_hidden_layers": 10_000, "num_attention_heads": 2**16, "num_key_value_heads": 2**16, "num_local_experts": 10_000,
    "num_experts": 10_000, "n_routed_experts": 10_000, "moe_num_experts": 10_000, "n_shared_experts": 10_000,
}  # fmt: skip
_MOST_OF_A_COUNT, _MOST_OF_ANYTHING = 2**31 - 1, 2**40

DOES_NOT_MATTER: dict[str, tuple[str, ...]] = {
    "training: nothing is dropped, disturbed or penalized in inference": (
        "initializer_range", "attention_dropout", "hidden_dropout", "dropout", "embd_pdrop", "resid_pdrop", "attn_pdrop",
        "classifier_dropout", "router_aux_loss_coef", "input_jitter_noise", "output_router_logits", "neftune_noise_alpha",
        "gradient_checkpointing", "embedding_dropout", "residual_dropout", "rescale_layer", "initializer_std",
    ),
    "how training split the model: the sums are the same": ("pretraining_tp", "tensor_parallel_degree", "tp_plan"),
    "labels of classifiers": ("id2label", "label2id", "num_labels", "problem_type", "finetuning_task", "task_specific_params"),
    "the tokenizer's business": (
        "bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "sep_token_id", "cls_token_id", "mask_token_id",
        "decoder_start_token_id", "tokenizer_class", "prefix", "suffix", "chat_template", "boi_token_index", "eoi_token_index",
        "image_token_index",
    ),
    "lengths that only tokenizers and servers read": (
        "max_sequence_length", "model_max_length", "tokenizer_model_max_length", "tokenizer_padding_side", "seq_length",
        "max_length",
    ),
    "generation: the engine computes logits, whoever runs it chooses tokens": (
        "assistant_confidence_threshold", "assistant_lookbehind", "bad_words_ids", "begin_suppress_tokens", "diversity_penalty",
        "do_sample", "early_stopping", "encoder_no_repeat_ngram_size", "encoder_repetition_penalty", "epsilon_cutoff",
        "eta_cutoff", "exponential_decay_length_penalty", "forced_bos_token_id", "forced_eos_token_id", "length_penalty",
        "min_length", "no_repeat_ngram_size", "num_assistant_tokens", "num_assistant_tokens_schedule", "num_beam_groups",
        "num_beams", "num_return_sequences", "output_scores", "remove_invalid_values", "repetition_penalty",
        "return_dict_in_generate", "suppress_tokens", "target_lookbehind", "temperature", "top_k", "top_p", "typical_p",
        "use_cache", "max_new_tokens", "generation_config", "sampling_params",
    ),
    "what transformers' call returns": ("output_attentions", "output_hidden_states", "return_dict", "use_return_dict"),
    "how transformers or another program runs it": (
        "_attn_implementation", "_attn_implementation_autoset", "_attn_implementation_internal", "attn_implementation",
        "_experts_implementation", "_experts_implementation_internal", "experts_implementation", "_flash_attn_2_enabled",
        "use_flash_attn", "use_flash_attention", "use_flash_attention_2", "cache_implementation", "torchscript", "use_bfloat16",
        "chunk_size_feed_forward", "transformers.js_config", "attn_weights_dtype", "onnx", "ollama",
    ),
    "where the file comes from": (
        "architectures", "model_type", "_name_or_path", "name_or_path", "_commit_hash", "transformers_version", "auto_map",
        "custom_pipelines", "torch_dtype", "dtype", "is_llama_config", "unsloth_version", "unsloth_fixed", "_from_model_config",
        "model_name", "license", "language", "author", "version", "is_composition",
    ),
    "another key says the same, and that one is read": ("sliding_window_size", "_sliding_window_pattern"),
    "marks of decoders, which all of these are": ("is_decoder",),
}  # fmt: skip
"""Reason -> keys that do not change the logits."""

MUST_BE: dict[str, tuple[Any, ...]] = {
    "is_causal": (True,),
    "is_encoder_decoder": (False,),
    "tie_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "use_bidirectional_attention": (False,),
    "attention_bias": (False,),
    "qkv_bias": (False,),
    "mlp_bias": (False,),
    "lm_head_bias": (False,),
    "bias": (False,),
    "no_bias": (True,),
    "rope_interleaved": (False,),
    "use_mrope": (False,),
    "qk_layernorm": (False,),
    "use_qk_norm": (False,),
    "use_bias": (False,),
    "clip_qkv": (None,),
    "use_sliding_window": (False,),
    "full_attn_mod": (1,),
    "interpolate_factor": (1,),
    "pruned_heads": ({},),
    "mlp_only_layers": ([],),
    "decoder_sparse_step": (1,),
    "num_nextn_predict_layers": (0,),
    "quantization_config": ({},),
}
"""Switches that no family here supports -> the values that turn them off. Null turns them off too."""

_IRRELEVANT = {key for keys in DOES_NOT_MATTER.values() for key in keys}


def check_sizes(config: Mapping[str, Any], where: str) -> None:
    """Refuse numbers that no model has, before any loop runs up to them. Raises ArchitectureError."""
    for key, value in config.items():
        if isinstance(value, (int, float)) and not abs(value) <= _MOST.get(key, _MOST_OF_ANYTHING):
            raise ArchitectureError(
                f"{abbreviated(key, 60)} in {where} is {shown(value)}, which no model has",
                "Use the config.json of the model's publisher.",
            )


def check_keys(config: Mapping[str, Any], architecture: str, table: ConfigTable, ignored: frozenset[str] = frozenset()) -> None:
    """Check that all keys are known and no unsupported switch is on. Raises ArchitectureError, which names the keys."""
    for problem in key_problems(config, architecture, table, ignored):
        raise problem


def key_problems(
    config: Mapping[str, Any], architecture: str, table: ConfigTable, ignored: frozenset[str] = frozenset()
) -> Iterator[ArchitectureError]:
    """Yield the error of another model_type, of each switch that is on, and of all unknown keys."""
    kind = config.get("model_type")
    if "model_type" in config and "model_type" not in ignored and table.model_types and kind not in table.model_types:
        yield ArchitectureError(
            f"model_type in config.json of {architecture} is {kind!r}, with which transformers loads another model",
            f"The model_type of {architecture} is {', '.join(table.model_types)}; set source.family if `architectures` is wrong.",
        )
    for key in switches_on(config, table, ignored):
        yield ArchitectureError(
            f"{key} in config.json of {architecture} is {shown(config[key])}, which this family does not have",
            f"Supported is {key}: {shown(MUST_BE[key][0])}. If the model does not depend on it, remove the key.",
        )
    unknown = unknown_keys(config, table, ignored)
    if unknown:
        names = ", ".join(shown(key) for key in unknown[:8]) + (", ..." if len(unknown) > 8 else "")
        yield ArchitectureError(
            f"config.json of {architecture} has keys that this family does not know: {names}",
            "If the model does not depend on them, name them in source.ignored_keys of the spec, or remove them from config.json.",
        )


def switches_on(config: Mapping[str, Any], table: ConfigTable, ignored: frozenset[str] = frozenset()) -> list[str]:
    """Return the keys of MUST_BE with another value, unless the family reads them."""
    known = _known_keys(table) | ignored
    return [key for key, values in MUST_BE.items() if key not in known and config.get(key) not in (None, *values)]


def _known_keys(table: ConfigTable) -> frozenset[str | None]:
    """Return the keys that a family reads or passes over."""
    alias = table.experts.alias if table.experts else None
    return frozenset({*table.defaults, *table.passed_over, *ROTARY_KEYS, *REQUIRED, alias})


def unknown_keys(config: Mapping[str, Any], table: ConfigTable, ignored: frozenset[str] = frozenset()) -> list[str]:
    """Return the keys with a value that neither the family nor any list of this file knows, sorted."""
    known = _known_keys(table) | ignored | _IRRELEVANT | MUST_BE.keys()
    return sorted(key for key, value in config.items() if value is not None and key not in known)


def config_warnings(config: Mapping[str, Any], architecture: str, table: ConfigTable) -> tuple[str, ...]:
    """Return warnings for keys that are skipped because transformers does not read them, and for values of doubtful meaning."""
    found = [
        f"{key} {shown(config[key])} in config.json of {architecture} is ignored, as in transformers: {passed.why}"
        for key, passed in table.passed_over.items()
        if key in config and passed.quiet is not None and config[key] not in passed.quiet
    ]
    read = {**table.defaults, **config}
    found += [
        f"{key} {value!r} in config.json of {architecture}: {why}"
        for (key, value), why in table.doubts.items()
        if read.get(key) == value
    ]
    return tuple(found)


def shown(value: Any) -> str:
    """Return the value for a message, shortened."""
    return abbreviated(repr(value), 60)


class Keys:
    """Typed values of one config.json over the family's defaults. Raises ArchitectureError, which names the key."""

    def __init__(self, config: Mapping[str, Any], architecture: str, table: ConfigTable) -> None:
        self.given, self.architecture, self.table = config, architecture, table
        for key in (*table.defaults, *REQUIRED):
            if key in config and config[key] is None and key not in table.nullable:
                raise self.error(key, "is null, which transformers does not accept", "Remove the key, or give it a value.")
        for key in sorted(table.required - config.keys()):
            raise ArchitectureError(f"config.json of {architecture} has no {key!r}", "Use the complete config.json of the model.")
        self._values = {**table.defaults, **config}
        for key, built in table.only.items():
            if self._values.get(key) not in built:
                problem = f"is {shown(self._values.get(key))}{'' if key in config else ' by default'}, which is not supported"
                raise self.error(key, problem, f"Supported: {', '.join(map(shown, built))}.")

    def error(
        self, key: str, problem: str, advice: str = "Use the config.json that was published with the model."
    ) -> ArchitectureError:
        """Return the error for `key`."""
        return ArchitectureError(f"{key} in config.json of {self.architecture} {problem}", advice)

    def get(self, key: str) -> Any:
        """Return the value, else the family's default, else None."""
        return self._values.get(key)

    def count(self, key: str, least: int = 1) -> int:
        if key not in self._values:
            raise ArchitectureError(
                f"config.json of {self.architecture} has no {key!r}", "Use the complete config.json of the model."
            )
        value, most = self._values[key], _MOST.get(key, _MOST_OF_A_COUNT)
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise self.error(key, f"is {shown(value)}, not a whole number from {least} to {most}")
        return value

    def maybe_count(self, key: str) -> int | None:
        return None if self._values.get(key) is None else self.count(key)

    def number(self, key: str) -> float:
        return number(self._values.get(key), f"{key} in config.json of {self.architecture}")

    def flag(self, key: str) -> bool:
        value = self._values.get(key)
        if value is None and key in self.table.nullable:
            return False
        if not isinstance(value, bool):
            raise self.error(key, f"is {shown(value)}, neither true nor false")
        return value

    def activation(self) -> str:
        key, known = self.table.activation, self.table.activations
        value = self._values.get(key)
        if not isinstance(value, str) or value not in known:
            raise self.error(key, f"is {shown(value)}, which is not supported", f"Supported: {', '.join(known)}.")
        return known[value]


def number(value: Any, where: str) -> float:
    """Return `value` as a finite float. Raises ArchitectureError, which names `where`, if it is not a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ArchitectureError(f"{where} is {shown(value)}, not a number")
    return float(value)
