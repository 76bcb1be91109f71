"""Megatron-Core's checkpoints of a Hugging Face model, written by megatron-core itself, in one process per rank.

    python -m tests.support.megatron JOB.json

JOB.json lists checkpoints (`Wanted`). Weights are sliced and fused here by the definition of Megatron-Core's layers, and saved with
`megatron.core.dist_checkpointing.save` of a `GPTModel`. Run configs are the fields of its `TransformerConfig`, and what
Megatron-Bridge's GPTModelProvider adds, in the YAML of Megatron-Bridge (utils/yaml_utils.py) or NeMo 2 (lightning/io/mixin.py).
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import json
import os
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TOKENS = (3, 1, 4, 15, 9, 2, 6, 5, 35, 8, 9, 7)
PADDED_ROWS = 5
"""Rows that are added to the vocabulary, at least."""


@dataclass(frozen=True)
class Wanted:
    """A checkpoint to write."""

    source: str
    """Hugging Face folder."""
    folder: str
    tp: int = 1
    pp: int = 1
    ep: int = 1
    nemo: bool = False
    """Whether in NeMo 2's folders and under its prefix."""
    per_layer: bool = False
    """Whether each layer and expert has keys of its own, and gate and up too."""
    layer_keys: bool = False
    """Whether each layer has keys of its own."""
    logits: bool = False
    """Whether to write what the model computes of TOKENS in float32, logits.npy."""


def write_checkpoints(wanted: list[Wanted], job: Path) -> None:
    """Write checkpoints with as many processes as the largest needs. Raises CalledProcessError."""
    ranks = max(one.tp * one.pp * one.ep for one in wanted)
    job.write_text(json.dumps([dataclasses.asdict(one) for one in wanted]))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks), "OMP_NUM_THREADS": "1"}
    command = [os.environ.get("MEGATRON_PYTHON", sys.executable), "-W", "ignore", "-m", "tests.support.megatron", str(job)]
    processes = [subprocess.Popen(command, env={**shared, "RANK": str(rank)}) for rank in range(ranks)]
    codes = [process.wait(120) for process in processes]
    if any(codes):
        raise subprocess.CalledProcessError(max(codes, key=abs), command)


def main(job: Path) -> None:
    """One rank: write its part of every checkpoint."""
    import torch
    import torch.distributed as dist
    from megatron.core import parallel_state

    # megatron-core calls these when it ties embeddings and saves, whether or not there is a GPU
    torch.cuda.synchronize = lambda *_: None
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment,return-value]
    torch.Tensor.cuda = lambda self, *_: self  # type: ignore[assignment,misc]
    dist.init_process_group("gloo")
    for wanted in [Wanted(**fields) for fields in json.loads(job.read_text())]:
        parallel_state.initialize_model_parallel(wanted.tp, wanted.pp, expert_model_parallel_size=wanted.ep)
        _write(wanted)
        dist.barrier()
        parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def _write(wanted: Wanted) -> None:
    import torch.distributed as dist
    from megatron.core import dist_checkpointing

    hugging_face = json.loads((Path(wanted.source) / "config.json").read_text())
    config, extra = _configs(hugging_face, wanted)
    model = _model(config, extra).bfloat16()
    _fill(model, Path(wanted.source), hugging_face)
    prefix = "module." if wanted.nemo else ""
    metadata = {"singleton_local_shards": wanted.per_layer, "non_homogeneous_layers": wanted.layer_keys or wanted.per_layer}
    weights = Path(wanted.folder, "weights") if wanted.nemo else Path(wanted.folder)
    weights.mkdir(parents=True, exist_ok=True)
    dist_checkpointing.save(model.sharded_state_dict(prefix=prefix, metadata=metadata), str(weights))
    if dist.get_rank() == 0:
        if wanted.logits:
            _write_logits(model, hugging_face["vocab_size"], Path(wanted.folder))
        _write_config(Path(wanted.folder), {**_plain(config), **extra}, nemo=wanted.nemo)


def _write_logits(model: Any, vocab_size: int, folder: Path) -> None:
    import numpy as np
    import torch
    from megatron.core.tensor_parallel import get_cuda_rng_tracker
    from megatron.core.transformer.moe import moe_utils

    moe_utils.te_general_gemm = None  # a name that megatron-core defines only beside Transformer Engine, and reads without it
    get_cuda_rng_tracker().fork = lambda *_: contextlib.nullcontext()  # dropout, of which there is none, asks for a GPU's
    for module in model.modules():
        if hasattr(module, "input_in_float16"):  # the softmax of attention, which would round to bfloat16
            module.input_in_float16 = module.input_in_fp16 = module.input_in_bf16 = False
    tokens = torch.tensor([TOKENS])
    positions = torch.arange(len(TOKENS))[None]
    masked = torch.ones(len(TOKENS), len(TOKENS)).triu(1).bool()[None, None]
    with torch.no_grad():
        found = model.float().eval()(tokens, positions, masked)
    np.save(folder / "logits.npy", found[0, :, :vocab_size].float().numpy())


def _configs(hugging_face: dict[str, Any], wanted: Wanted) -> tuple[Any, dict[str, Any]]:
    """Megatron-Core's config of a Hugging Face model, and what GPTModelProvider adds to it."""
    import torch
    from megatron.core.transformer.transformer_config import TransformerConfig

    kind, layers = hugging_face["model_type"], hugging_face["num_hidden_layers"]
    config = TransformerConfig(
        num_layers=layers, hidden_size=hugging_face["hidden_size"], num_attention_heads=hugging_face["num_attention_heads"],
        num_query_groups=hugging_face["num_key_value_heads"], kv_channels=hugging_face.get("head_dim"),
        ffn_hidden_size=hugging_face["intermediate_size"], layernorm_epsilon=hugging_face["rms_norm_eps"],
        normalization="RMSNorm", gated_linear_unit=True, activation_func=torch.nn.functional.silu, add_bias_linear=False,
        add_qkv_bias=kind == "qwen2", qk_layernorm=kind in ("qwen3", "qwen3_moe"), hidden_dropout=0.0, attention_dropout=0.0,
        use_cpu_initialization=True, params_dtype=torch.bfloat16, pipeline_dtype=torch.bfloat16, bf16=True,
        tensor_model_parallel_size=wanted.tp, pipeline_model_parallel_size=wanted.pp, expert_model_parallel_size=wanted.ep,
        num_layers_in_first_pipeline_stage=layers - layers // wanted.pp if wanted.pp > 1 else None, **_experts(hugging_face),
    )  # fmt: skip
    rotary = hugging_face.get("rope_parameters") or hugging_face
    extra = {
        "position_embedding_type": "rope", "rotary_percent": 1.0, "rotary_base": float(rotary["rope_theta"]),
        "rope_scaling": rotary.get("rope_type") == "llama3", "rope_scaling_factor": float(rotary.get("factor") or 8.0),
        "seq_length": hugging_face["max_position_embeddings"], "vocab_size": hugging_face["vocab_size"],
        "share_embeddings_and_output_weights": hugging_face["tie_word_embeddings"], "should_pad_vocab": True,
        "make_vocab_size_divisible_by": 128, "seq_len_interpolation_factor": None, "parallel_output": True,
    }  # fmt: skip
    return config, extra


def _experts(hugging_face: dict[str, Any]) -> dict[str, Any]:
    experts = hugging_face.get("num_experts") or hugging_face.get("num_local_experts")
    if not experts:
        return {}
    size = hugging_face.get("moe_intermediate_size") or hugging_face["intermediate_size"]
    return {
        "num_moe_experts": experts, "moe_ffn_hidden_size": size, "moe_router_topk": hugging_face["num_experts_per_tok"],
        "moe_grouped_gemm": False, "moe_router_pre_softmax": hugging_face.get("norm_topk_prob") is False,
    }  # fmt: skip


def _model(config: Any, extra: dict[str, Any]) -> Any:
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    spec = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts, moe_grouped_gemm=False, qk_layernorm=config.qk_layernorm, normalization="RMSNorm"
    )
    return GPTModel(
        config, spec, vocab_size=-(-(extra["vocab_size"] + PADDED_ROWS) // 8) * 8, max_sequence_length=extra["seq_length"],
        position_embedding_type="rope", rotary_base=int(extra["rotary_base"]), rope_scaling=extra["rope_scaling"],
        rope_scaling_factor=extra["rope_scaling_factor"],
        share_embeddings_and_output_weights=extra["share_embeddings_and_output_weights"],
        pre_process=parallel_state.is_pipeline_first_stage(), post_process=parallel_state.is_pipeline_last_stage(),
    )  # fmt: skip


def _fill(model: Any, source: Path, hugging_face: dict[str, Any]) -> None:
    """Give every parameter of this rank's model its part of the Hugging Face tensors."""
    import torch
    from safetensors import safe_open

    with safe_open(source / "model.safetensors", "pt") as file, torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(_parameter(name, parameter, model, file.get_tensor, hugging_face))


def _parameter(name: str, parameter: Any, model: Any, tensor: Any, hugging_face: dict[str, Any]) -> Any:
    import torch
    from megatron.core import parallel_state

    tp, tp_rank = parallel_state.get_tensor_model_parallel_world_size(), parallel_state.get_tensor_model_parallel_rank()
    if name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        is_tied = name.startswith("embedding") or hugging_face["tie_word_embeddings"]
        rows = tensor("model.embed_tokens.weight" if is_tied else "lm_head.weight")
        padding = torch.full((parameter.shape[0] * tp - len(rows), rows.shape[1]), 7.0, dtype=rows.dtype)
        return torch.cat([rows, padding]).chunk(tp)[tp_rank]
    if name == "decoder.final_layernorm.weight":
        return tensor("model.norm.weight")
    _, _, local, inner = name.split(".", 3)
    prefix = f"model.layers.{model.decoder.layers[int(local)].layer_number - 1}."
    part = {
        "input_layernorm.weight": "input_layernorm.weight", "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
        "self_attention.q_layernorm.weight": "self_attn.q_norm.weight", "mlp.linear_fc2.weight": "mlp.down_proj.weight",
        "self_attention.k_layernorm.weight": "self_attn.k_norm.weight",
        "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
    }.get(inner)  # fmt: skip
    if part:
        whole = tensor(prefix + part)
        return whole if whole.dim() == 1 else whole.chunk(tp, dim=1)[tp_rank]
    if inner.startswith("self_attention.linear_qkv."):
        kind, groups = inner.rpartition(".")[2], hugging_face["num_key_value_heads"]
        q, k, v = (tensor(f"{prefix}self_attn.{letter}_proj.{kind}").chunk(groups) for letter in "qkv")
        return torch.cat([rows for group in zip(q, k, v, strict=True) for rows in group]).chunk(tp)[tp_rank]
    if inner == "mlp.linear_fc1.weight":
        return torch.cat([tensor(f"{prefix}mlp.{half}_proj.weight").chunk(tp)[tp_rank] for half in ("gate", "up")])
    return _expert(inner, prefix, tensor, mixtral=hugging_face["model_type"] == "mixtral")


def _expert(inner: str, prefix: str, tensor: Any, *, mixtral: bool) -> Any:
    import torch
    from megatron.core import parallel_state

    block = prefix + ("block_sparse_moe." if mixtral else "mlp.")
    if inner == "mlp.router.weight":
        return tensor(block + "gate.weight")
    *_, local, linear, _ = inner.split(".")  # mlp.experts.local_experts.N.linear_fc1.weight
    ep, ep_rank = parallel_state.get_expert_model_parallel_world_size(), parallel_state.get_expert_model_parallel_rank()
    tp, tp_rank = parallel_state.get_expert_tensor_parallel_world_size(), parallel_state.get_expert_tensor_parallel_rank()
    total = sum(1 for name in tensor.__self__.keys() if name.startswith(block + "experts.")) // 3  # noqa: SIM118
    expert = f"{block}experts.{ep_rank * (total // ep) + int(local)}."
    gate, down, up = ("w1", "w2", "w3") if mixtral else ("gate_proj", "down_proj", "up_proj")
    if linear == "linear_fc1":
        return torch.cat([tensor(f"{expert}{half}.weight").chunk(tp)[tp_rank] for half in (gate, up)])
    return tensor(f"{expert}{down}.weight").chunk(tp, dim=1)[tp_rank]


def _plain(config: Any) -> dict[str, Any]:
    """Fields of a config as Megatron-Bridge and NeMo 2 write them: functions, dtypes and enums by name."""

    def plain(value: Any) -> Any:
        if isinstance(value, enum.Enum):
            return {"_args_": [value.value], "_call_": True, "_target_": f"{type(value).__module__}.{type(value).__qualname__}"}
        if value is None or isinstance(value, (bool, int, float, str, list, dict)):
            return value
        target = (
            str(value)
            if str(value).startswith("torch.")
            else f"{getattr(value, '__module__', '')}.{getattr(value, '__name__', '')}"
        )
        return {"_call_": False, "_target_": target.replace("torch.nn.functional.silu", "torch.nn.functional.silu")}

    return {field.name: plain(getattr(config, field.name)) for field in dataclasses.fields(config)}


def _write_config(folder: Path, model: dict[str, Any], *, nemo: bool) -> None:
    import yaml

    if nemo:
        (folder / "context").mkdir(exist_ok=True)
        named = {"_target_": "nemo.collections.llm.gpt.model.base.GPTConfig", **model}
        document = {"_target_": "nemo.collections.llm.gpt.model.base.GPTModel", "config": named, "optim": None, "tokenizer": None}
        (folder / "context" / "model.yaml").write_text(yaml.safe_dump(document))
    else:
        named = {"_target_": "megatron.bridge.models.gpt_provider.GPTModelProvider", **model}
        (folder / "run_config.yaml").write_text(yaml.safe_dump({"model": named, "train": {"train_iters": 10}}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
