"""config.json of a model that Megatron-Bridge or NeMo 2 trained, from the run's own config.

Both record the arguments of Megatron-Core's model: `model` in run_config.yaml, `config` in context/model.yaml (`TransformerConfig`
of megatron/core, `GPTModelProvider` of Megatron-Bridge, `GPTConfig` of NeMo). The family follows from what the model computes, not
from the name of a class. What the model computes and no family here has is refused by name. NeMo's context/io.json cannot stand in
for model.yaml: it records the arguments that were passed, and leaves the others to the defaults of NeMo's classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from orchestrator.base.errors import ArchitectureError, SourceCorruptError, SourceMissingError, SpecError, abbreviated
from orchestrator.checkpoints.megatron_layout import Layout
from orchestrator.spec.yaml_text import parse_yaml
from orchestrator.stores.source import SourceFolder

_RENAMED = {
    "num_layers": "num_hidden_layers", "hidden_size": "hidden_size", "num_attention_heads": "num_attention_heads",
    "num_query_groups": "num_key_value_heads", "kv_channels": "head_dim", "ffn_hidden_size": "intermediate_size",
    "vocab_size": "vocab_size", "seq_length": "max_position_embeddings", "layernorm_epsilon": "rms_norm_eps",
    "rotary_base": "rope_theta", "share_embeddings_and_output_weights": "tie_word_embeddings",
}  # fmt: skip
"""Megatron's name -> that of config.json. Source: CONFIG_MAPPING of Megatron-Bridge's models/conversion/model_bridge.py."""
_REQUIRED = (
    "num_layers",
    "hidden_size",
    "num_attention_heads",
    "ffn_hidden_size",
    "seq_length",
    "layernorm_epsilon",
    "rotary_base",
)
_COUNTS = (*_REQUIRED[:5], "num_query_groups", "kv_channels", "vocab_size", "num_moe_experts", "moe_ffn_hidden_size",
           "moe_router_topk", "old_context_len")  # fmt: skip
_NUMBERS = ("layernorm_epsilon", "rotary_base", "scale_factor", "low_freq_factor", "high_freq_factor", "rope_scaling_factor")
_MOST, _MOST_LAYERS = 2**32, 100_000

_MUST_BE: dict[str, tuple[Any, ...]] = {
    "normalization": ("RMSNorm",), "gated_linear_unit": (True,), "position_embedding_type": ("rope",), "add_bias_linear": (False,),
    "rotary_percent": (1, None), "softmax_type": ("vanilla", None), "moe_layer_freq": (1, None),
    "moe_router_score_function": ("softmax", None), "moe_router_topk_scaling_factor": (1, None),
    "moe_router_load_balancing_type": ("aux_loss", "seq_aux_loss", "global_aux_loss", "none", None),
}  # fmt: skip
"""Key -> values with which the model is one of the families. The first is the one that a message asks for."""
_DEFAULTS = {"normalization": "LayerNorm", "gated_linear_unit": False, "position_embedding_type": "learned_absolute",
             "add_bias_linear": True}  # fmt: skip
"""Megatron-Core's defaults of keys of _MUST_BE, where they are no value of _MUST_BE."""
_READ = {*_RENAMED, *_COUNTS, *_NUMBERS, *_MUST_BE, "_target_", "activation_func", "qk_layernorm", "add_qkv_bias",
         "moe_router_pre_softmax", "rope_scaling"}  # fmt: skip
_TRAINING = frozenset(
    """
    account_for_embedding_in_pipeline_split account_for_loss_in_pipeline_split activation_func_fp8_input_store
    apply_query_key_layer_scaling apply_rope_fusion async_tensor_model_parallel_allreduce attention_backend attention_dropout
    attention_softmax_in_fp32 autocast_dtype barrier_with_L1_time batch_invariant_mode batch_p2p_comm batch_p2p_sync bf16
    bias_activation_fusion bias_dropout_add_fusion bias_dropout_fusion calculate_per_token_loss clone_scatter_output_in_embedding
    config_logger_dir context_parallel_size cp_comm_type cpu_offloading cpu_offloading_activations
    cpu_offloading_double_buffering cpu_offloading_num_layers cpu_offloading_weights cross_entropy_fusion_impl
    cross_entropy_loss_fusion cuda_graph_impl cuda_graph_modules cuda_graph_retain_backward_graph cuda_graph_scope
    cuda_graph_use_single_mempool cuda_graph_warmup_steps data_step_fn deallocate_pipeline_outputs defer_embedding_wgrad_compute
    delay_wgrad_compute deterministic_mode disable_bf16_reduced_precision_matmul disable_parameter_transpose_cache
    distribute_saved_activations dsa_indexer_loss_coeff embedding_init_method embedding_init_method_std enable_autocast
    enable_cuda_graph ep_overlap_early_attn_memory_release expert_model_parallel_size expert_tensor_parallel_size
    external_cuda_graph finalize_model_grads_func fine_grained_activation_offloading first_last_layers_bf16 flash_decode
    forward_step_fn fp16 fp16_lm_cross_entropy fp32_residual_connection fp4_recipe fp8 fp8_amax_compute_algo
    fp8_amax_history_len fp8_dot_product_attention fp8_interval fp8_margin fp8_multi_head_attention fp8_recipe fp8_wgrad
    fused_single_qkv_rope generation_config grad_scale_func grad_sync_func gradient_accumulation_fusion
    hetereogenous_dist_checkpoint hf_model_id hidden_dropout hierarchical_context_parallel_sizes hybrid_context_parallel
    inference_fuse_tp_communication inference_rng_tracker inference_sampling_seed init_method init_method_std
    init_model_with_meta_device kitchen_attention_backend linear_conv_kernel_dim linear_key_head_dim linear_num_key_heads
    linear_num_value_heads linear_value_head_dim log_max_attention_logit make_vocab_size_divisible_by mamba_head_dim
    mamba_num_groups mamba_state_dim masked_softmax_fusion max_position_embeddings max_seqlen_per_dp_cp_rank
    memory_efficient_layer_norm microbatch_group_size_per_vp_stage min_offloaded_tensor_size mlp_chunks_for_prefill
    moe_aux_loss_coeff moe_deepep_num_sms moe_enable_deepep moe_enable_routing_replay moe_extended_tp
    moe_flex_dispatcher_backend moe_grouped_gemm moe_hybridep_num_sms moe_input_jitter_eps moe_layer_recompute
    moe_pad_expert_input_to_capacity moe_per_layer_logging moe_permute_fusion moe_router_bias_update_rate moe_router_dtype
    moe_router_fusion moe_router_padding_for_fp8 moe_router_padding_for_quantization moe_shared_expert_overlap
    moe_token_dispatcher_type moe_token_drop_policy moe_use_legacy_grouped_gemm moe_z_loss_coeff mtp_enabled
    mtp_loss_scaling_factor no_sync_func num_layers_at_end_in_bf16 num_layers_at_start_in_bf16
    num_layers_in_first_pipeline_stage num_layers_in_last_pipeline_stage num_microbatches_with_partial_activation_checkpoints
    offload_modules output_layer_init_method overlap_moe_expert_parallel_comm overlap_p2p_comm overlap_p2p_comm_warmup_flush
    parallel_output param_sync_func params_dtype perform_initialization persist_layer_norm pipeline_dtype
    pipeline_model_parallel_comm_backend pipeline_model_parallel_layout pipeline_model_parallel_size
    pipeline_model_parallel_split_rank qk_clip qk_clip_alpha qk_clip_balancing_threshold qk_clip_threshold
    recompute_granularity recompute_method recompute_modules recompute_num_layers scatter_embedding_sequence_parallel
    sequence_parallel should_pad_vocab symmetric_ar_type tensor_model_parallel_size test_mode timers tp_comm_atomic_ag
    tp_comm_atomic_rs tp_comm_bootstrap_backend tp_comm_bulk_dgrad tp_comm_bulk_wgrad tp_comm_overlap tp_comm_overlap_ag
    tp_comm_overlap_cfg tp_comm_overlap_disable_fc1 tp_comm_overlap_disable_qkv tp_comm_overlap_rs tp_comm_overlap_rs_dgrad
    tp_comm_split_ag tp_comm_split_rs tp_only_amax_red transformer_impl transformer_layer_spec use_cpu_initialization
    use_inference_optimized_layers use_kitchen use_kitchen_attention use_mamba_mem_eff_path use_ring_exchange_p2p
    use_te_activation_func use_te_rng_tracker use_transformer_engine_full_layer_spec use_transformer_engine_op_fuser
    variable_seq_lengths virtual_pipeline_model_parallel_size wgrad_deferral_limit
    """.split()  # noqa: SIM905
)
"""Keys of how the model was trained, cut over GPUs, or computed, which do not say what it computes.

From the fields of TransformerConfig in Megatron-Core 0.16, GPTModelProvider in Megatron-Bridge 0.3, and GPTConfig in NeMo 2. Of
other keys, those that are off (null, false, 0) do not matter, and those that are on are refused by name.
"""


def read_config(folder: SourceFolder, layout: Layout, names: list[str]) -> dict[str, Any]:
    """Return config.json of the model of a checkpoint with files `names`. Without vocab_size if the run does not record it.

    Keys that no family knows keep their names, so that the family refuses them. Raises SourceMissingError, SourceCorruptError;
    ArchitectureError for a model that is not one of the families.
    """
    where = f"{folder.url}/{layout.config}"
    if layout.config not in names:
        raise SourceMissingError(
            f"{where} is missing, which says what the model computes",
            f"Copy {layout.config} from the run, or import the checkpoint with Megatron-Bridge, which writes run_config.yaml.",
        )
    try:
        document = parse_yaml(folder.read(layout.config), where).data
    except SpecError as error:
        raise SourceCorruptError(error.message, "Copy the file from the run again.") from None
    model = document.get(layout.section) if isinstance(document, dict) else None
    if not isinstance(model, dict):
        raise SourceCorruptError(f"{where} has no {layout.section}", "Copy the file from the run again.")
    _check(model, where)
    return _config(model, where)


def _check(model: Mapping[str, Any], where: str) -> None:
    """Check the values that are needed. Raises SourceCorruptError, ArchitectureError."""
    for key in (*_COUNTS, *_NUMBERS):
        value: Any = model.get(key)
        kinds = (int,) if key in _COUNTS else (int, float)
        if value is None and key not in _REQUIRED:
            continue
        if type(value) not in kinds or not 0 < value < (_MOST_LAYERS if key == "num_layers" else _MOST):
            raise SourceCorruptError(f"{where}: {key} is {abbreviated(repr(value), 60)}, not a number of a model")
    for key, allowed in _MUST_BE.items():
        value = model.get(key, _DEFAULTS.get(key))
        if not any(value is None if one is None else type(value) in (type(one), float) and value == one for one in allowed):
            raise ArchitectureError(
                f"{where}: {key} is {abbreviated(repr(value), 60)}, which no family has that Megatron's format is read for",
                f"Read is {key}: {allowed[0]}.",
            )
    activation = model.get("activation_func")
    target = activation.get("_target_") if isinstance(activation, dict) else activation
    if not isinstance(target, str) or target.rpartition(".")[2] != "silu":
        raise ArchitectureError(f"{where}: activation_func is {abbreviated(repr(target), 80)}, not silu", "Read is silu.")


def _config(model: Mapping[str, Any], where: str) -> dict[str, Any]:
    config = {new: model[old] for old, new in _RENAMED.items() if model.get(old) is not None}
    heads = config["num_attention_heads"]
    config.setdefault("num_key_value_heads", heads)
    config.setdefault("head_dim", max(config["hidden_size"] // heads, 1))
    config.setdefault("tie_word_embeddings", True)
    if heads % config["num_key_value_heads"]:
        raise SourceCorruptError(f"{where}: {config['num_key_value_heads']} query groups do not divide {heads} heads")
    if config["head_dim"] * heads == config["hidden_size"]:
        config.pop("head_dim")  # what every family takes then, and Qwen2 has no such key
    config |= _special_tokens(model)
    config |= {"hidden_act": "silu", "rope_scaling": _rotary_scaling(model), **_family(model, where)}
    unknown = {key: value for key, value in model.items() if value and key not in _READ and key not in _TRAINING}
    return {**unknown, **config}


def _special_tokens(model: Mapping[str, Any]) -> dict[str, Any]:
    """Return the ids of tokens that the run took over from the Hugging Face model's generation_config.json."""
    given = model.get("generation_config")
    found = given.get("config_dict") if isinstance(given, dict) else None
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {name: found[name] for name in names if found.get(name) is not None} if isinstance(found, dict) else {}


def _rotary_scaling(model: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the scaling of Llama 3.1, as Megatron-Core (rope_scaling) or Llama31Config (scale_factor) switches it on."""
    factor = model.get("scale_factor") or (model.get("rope_scaling_factor") or 8.0 if model.get("rope_scaling") else None)
    if not factor:
        return None
    return {
        "rope_type": "llama3",
        "factor": float(factor),
        "low_freq_factor": float(model.get("low_freq_factor") or 1.0),
        "high_freq_factor": float(model.get("high_freq_factor") or 4.0),
        "original_max_position_embeddings": model.get("old_context_len") or 8192,
    }


def _family(model: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the keys that differ between the families. Raises ArchitectureError for a combination that none has."""
    norms, biases, experts = bool(model.get("qk_layernorm")), bool(model.get("add_qkv_bias")), model.get("num_moe_experts")
    if biases and (norms or experts):
        raise ArchitectureError(
            f"{where}: add_qkv_bias beside {'qk_layernorm' if norms else 'num_moe_experts'}: no family has both"
        )
    if not experts:
        name = "Qwen3" if norms else "Qwen2" if biases else "Llama"
        return {"architectures": [f"{name}ForCausalLM"], "model_type": name.lower()}
    size, topk = model.get("moe_ffn_hidden_size") or model["ffn_hidden_size"], model.get("moe_router_topk") or 2
    if norms:
        return {
            "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "num_experts": experts,
            "num_experts_per_tok": topk, "moe_intermediate_size": size, "norm_topk_prob": not model.get("moe_router_pre_softmax"),
        }  # fmt: skip
    if model.get("moe_router_pre_softmax"):
        raise ArchitectureError(f"{where}: moe_router_pre_softmax is on, which Mixtral does not have", "Read is: false.")
    return {
        "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "num_local_experts": experts, "num_experts_per_tok": topk,
        "intermediate_size": size,
    }  # fmt: skip
