"""A plain decoder in torch (Llama, Mixtral, Qwen MoE) that rounds weights and activations explicitly, from packed rank files.

The oracle of quantized graphs: it shares no code with packers, networks or binding. All tokens are computed at once, without a
cache; the ranks of a tensor-parallel model one after the other, since scales per token are of a rank's own features.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as functional

from orchestrator.model.config import ModelConfig
from orchestrator.model.quantization import ActivationFormat, KvCacheFormat, LinearFormat, ModelQuantization, WeightFormat

Rank = dict[str, torch.Tensor]
_E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def dequantized(rank: Rank, linear: str, fmt: LinearFormat) -> torch.Tensor:
    """float32 [out, in]."""
    weight = rank[f"{linear}.weight"]
    name = "per_channel_scale" if fmt.weight is WeightFormat.FP8_CHANNEL else "weights_scaling_factor"
    scale = rank[f"{linear}.{name}"]
    match fmt.weight:
        case WeightFormat.INT8_CHANNEL | WeightFormat.FP8_CHANNEL:
            return weight.float() * scale[:, None]
        case WeightFormat.FP8_TENSOR:
            return weight.float() * scale
        case WeightFormat.INT4_BLOCK | WeightFormat.INT4_BLOCK_FP8:
            # int8 shifts extend the sign: the even row is in the low nibble.
            rows = torch.stack([(weight << 4) >> 4, weight >> 4], dim=1).flatten(0, 1)
            wide = rows.float() * scale.repeat_interleave(fmt.block_size, dim=1)
            if fmt.weight is WeightFormat.INT4_BLOCK:
                return wide
            return _through_fp8(wide, rank[f"{linear}.weights_scaling_factor_2"])
        case WeightFormat.NVFP4:
            codes = torch.stack([weight & 15, weight >> 4], dim=2).flatten(1).int()
            values = _E2M1[codes & 7] * torch.where(codes > 7, -1.0, 1.0)
            factors = scale.float() * rank[f"{linear}.weights_scaling_factor_2"]
            return values * factors.repeat_interleave(16, dim=1)
        case WeightFormat.MXFP8:
            return weight.float() * torch.exp2(scale.float() - 127).repeat_interleave(32, dim=1)


def rounded(x: torch.Tensor, rank: Rank, linear: str, fmt: LinearFormat) -> torch.Tensor:
    """x [..., in] as the product sees it, float32."""
    if fmt.pre_quant_scale:
        x = x * rank[f"{linear}.prequant_scaling_factor"].float()
    scale = rank.get(f"{linear}.activation_scaling_factor", torch.ones(1))
    match fmt.activation:
        case ActivationFormat.NONE:
            return x
        case ActivationFormat.INT8_TENSOR:
            return _through_int8(x, scale)
        case ActivationFormat.FP8_TENSOR:
            return _through_fp8(x, scale)
        case ActivationFormat.FP8_TOKEN:
            amax = x.abs().amax(dim=-1, keepdim=True)
            limit = float("inf") if fmt.activation_limit is None else fmt.activation_limit
            return _through_fp8(x, amax.clamp(max=limit) / 448)
        case ActivationFormat.NVFP4:
            blocks = x.unflatten(-1, (-1, 16))
            amax = blocks.abs().amax(dim=-1, keepdim=True)
            factors = (amax / (6 * scale)).clamp(2.0**-9, 448).to(torch.float8_e4m3fn).float() * scale
            return (_nearest_e2m1(blocks / factors) * factors).flatten(-2)
        case ActivationFormat.MXFP8:
            blocks = x.unflatten(-1, (-1, 32))
            amax = blocks.abs().amax(dim=-1, keepdim=True).clamp(min=1e-30)
            factors = torch.exp2(torch.ceil(torch.log2(amax / 448)))
            return _through_fp8(blocks, factors).flatten(-2)


def _through_fp8(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale


def _through_int8(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (x / scale).round().clamp(-128, 127) * scale


def _nearest_e2m1(x: torch.Tensor) -> torch.Tensor:
    """By distance to each of the eight numbers; on a tie the even one, of which the list's even places are."""
    distance = (x.abs()[..., None] - _E2M1).abs()
    tied = distance == distance.amin(dim=-1, keepdim=True)
    even = torch.arange(8) % 2 == 0
    chosen = torch.where(tied, 1 + even.int(), 0).argmax(dim=-1)
    return _E2M1[chosen] * x.sign()


def _of_expert(rank: Rank, prefix: str, expert: int) -> Rank:
    """The tensors of one expert; the scales of activations are the layer's."""
    own = ("weight", "weights_scaling_factor", "weights_scaling_factor_2", "per_channel_scale")
    names = [f"{prefix}.{linear}" for linear in ("fc", "proj")]
    mine = {f"{name}.{part}" for name in names for part in own} & rank.keys()
    return {**rank, **{name: rank[name][expert] for name in mine}}


class FakeQuantDecoder:
    """The ranks of a model of one stage, in float32."""

    def __init__(self, config: ModelConfig, quantization: ModelQuantization | None, ranks: Sequence[Rank]) -> None:
        self.config, self.ranks = config, ranks
        self._quantization = quantization

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """[batch, tokens, vocabulary], every token seeing those before it."""
        first = self.ranks[0]
        x = first["transformer.vocab_embedding.weight"].float()[tokens]
        for layer in range(self.config.num_hidden_layers):
            prefix = f"transformer.layers.{layer}"
            normed = self._norm(x, first[f"{prefix}.input_layernorm.weight"])
            x = x + sum(self._attention(rank, normed, f"{prefix}.attention") for rank in range(len(self.ranks)))
            normed = self._norm(x, first[f"{prefix}.post_layernorm.weight"])
            x = x + sum(self._mlp(rank, normed, f"{prefix}.mlp") for rank in range(len(self.ranks)))
        x = self._norm(x, first["transformer.ln_f.weight"])
        head = torch.cat([rank["lm_head.weight"].float() for rank in self.ranks])[: self.config.vocab_size]
        return x @ head.T

    def _linear(self, rank: int, x: torch.Tensor, name: str) -> torch.Tensor:
        return self._product(self.ranks[rank], x, name)

    def _product(self, tensors: Rank, x: torch.Tensor, name: str) -> torch.Tensor:
        fmt = self._quantization.format_of(name) if self._quantization and not name.endswith(("router", "expert_gate")) else None
        weight = dequantized(tensors, name, fmt) if fmt else tensors[f"{name}.weight"].float()
        product = (rounded(x, tensors, name, fmt) if fmt else x) @ weight.T
        return product + tensors[f"{name}.bias"].float() if f"{name}.bias" in tensors else product

    def _norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return functional.rms_norm(x, (x.shape[-1],), weight.float(), self.config.norm_epsilon)

    def _mlp(self, rank: int, x: torch.Tensor, prefix: str) -> torch.Tensor:
        if self.config.has_experts(0):
            return self._moe(rank, x, prefix)
        if self.config.hidden_act == "swiglu":
            return self._linear(rank, self._gated(self._linear(rank, x, f"{prefix}.fc")), f"{prefix}.proj")
        gate = functional.silu(self._linear(rank, x, f"{prefix}.fc"))
        return self._linear(rank, gate * self._linear(rank, x, f"{prefix}.gate"), f"{prefix}.proj")

    def _moe(self, rank: int, x: torch.Tensor, prefix: str) -> torch.Tensor:
        """A rank's part of all experts, each token through those that the router chose."""
        moe = self.config.moe
        assert moe is not None
        values, indices = self._linear(rank, x, f"{prefix}.router").softmax(dim=-1).topk(moe.top_k, dim=-1)
        if moe.normalization_mode == 1:
            values = values / values.sum(dim=-1, keepdim=True)
        routing = torch.zeros(*x.shape[:-1], moe.num_experts).scatter(-1, indices, values)
        total = torch.zeros_like(x)
        for expert in range(moe.num_experts):
            tensors = _of_expert(self.ranks[rank], prefix, expert)
            out = self._product(tensors, self._gated(self._product(tensors, x, f"{prefix}.fc")), f"{prefix}.proj")
            total = total + routing[..., expert, None] * out
        if moe.shared_expert_intermediate_size:
            shared = self._gated(self._linear(rank, x, f"{prefix}.shared_expert.fc"))
            weight = self._linear(rank, x, f"{prefix}.shared_expert_gate").sigmoid()
            total = total + weight * self._linear(rank, shared, f"{prefix}.shared_expert.proj")
        return total

    @staticmethod
    def _gated(both: torch.Tensor) -> torch.Tensor:
        up, gate = both.chunk(2, dim=-1)
        return functional.silu(gate) * up

    def _latent_attention(self, rank: int, x: torch.Tensor, prefix: str) -> torch.Tensor:
        """Expanded, with a key and a value per head, as transformers computes it."""
        config = self.config
        rope, heads = config.qk_rope_head_dim, config.num_attention_heads // len(self.ranks)
        fused = self._linear(rank, x, f"{prefix}.fused_a").split([config.q_lora_rank, config.kv_lora_rank, rope], dim=-1)
        names = ("q_a_layernorm", "kv_a_layernorm")
        q, latent = (
            functional.rms_norm(part, (part.shape[-1],), self.ranks[rank][f"{prefix}.{name}.weight"].float(), 1e-6)
            for part, name in zip(fused, names, strict=False)
        )
        q = self._linear(rank, q, f"{prefix}.q_b_proj").unflatten(-1, (heads, -1)).transpose(1, 2)
        k, v = (torch.einsum("bsl,hdl->bhsd", latent, self.ranks[rank][f"{prefix}.{name}_b_proj.weight"].float()) for name in "kv")
        plain, turned = q.split([config.qk_nope_head_dim, rope], dim=-1)
        shared = self._rotated(fused[2][:, None]).expand(-1, heads, -1, -1)
        q, k = torch.cat([plain, self._rotated(turned)], dim=-1), torch.cat([k, shared], dim=-1)
        context = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self._linear(rank, context.transpose(1, 2).flatten(2), f"{prefix}.dense")

    def _attention(self, rank: int, x: torch.Tensor, prefix: str) -> torch.Tensor:
        if self.config.is_latent:
            return self._latent_attention(rank, x, prefix)
        size, num_ranks = self.config.head_size, len(self.ranks)
        heads, kv_heads = self.config.num_attention_heads // num_ranks, self.config.num_key_value_heads // num_ranks
        split = [heads * size, kv_heads * size, kv_heads * size]
        q, k, v = (
            part.unflatten(-1, (-1, size)).transpose(1, 2) for part in self._linear(rank, x, f"{prefix}.qkv").split(split, dim=-1)
        )
        k = self._cached(rank, self._rotated(k), f"{prefix}.k")
        v = self._cached(rank, v, f"{prefix}.v")
        context = functional.scaled_dot_product_attention(self._rotated(q), k, v, is_causal=True, enable_gqa=True)
        return self._linear(rank, context.transpose(1, 2).flatten(2), f"{prefix}.dense")

    def _cached(self, rank: int, x: torch.Tensor, prefix: str) -> torch.Tensor:
        kind: KvCacheFormat | None = self._quantization.kv_cache if self._quantization else None
        if kind is None:
            return x
        scale = self.ranks[rank][f"{prefix}_cache_scaling_factor"]
        return _through_fp8(x, scale) if kind == "FP8" else _through_int8(x, scale)

    def _rotated(self, x: torch.Tensor) -> torch.Tensor:
        half = x.shape[-1] // 2
        inverse = self.config.rotary_base ** (-torch.arange(half, dtype=torch.float64) / half)
        angles = torch.outer(torch.arange(x.shape[2], dtype=torch.float64), inverse)
        cos, sin = angles.cos().float(), angles.sin().float()
        pairs = self.config.rotary_interleaved
        one, two = (x[..., 0::2], x[..., 1::2]) if pairs else (x[..., :half], x[..., half:])
        return torch.cat([one * cos - two * sin, two * cos + one * sin], dim=-1)
