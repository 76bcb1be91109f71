"""The sizes and formats of one tensor-parallel rank of a stage."""

from __future__ import annotations

from dataclasses import dataclass, replace

from orchestrator.model.config import ModelConfig
from orchestrator.model.quantization import LINEARS, KvCacheFormat, LinearFormat
from orchestrator.model.stage import ExpertForm, StageOptions


@dataclass(frozen=True, slots=True)
class RankShape:
    """Sizes and formats of a rank's graph."""

    stage: StageOptions
    dtype: str
    """Dtype of the graph's arithmetic and of unquantized weights."""
    tp_rank: int = 0
    portable: bool = False
    """Whether to use standard operators only."""
    halved: bool = False
    """Whether the cache tensor of a latent attention is two halves."""
    in_place: bool = True
    """Whether a KV cache in the graph's dtype is updated in place."""
    experts: ExpertForm = "dense"
    """Which of its experts a rank computes."""
    runtime_layers: bool = False
    """Whether layers of ONNX Runtime's own may stand in the graph."""

    @property
    def config(self) -> ModelConfig:
        return self.stage.config

    def of_layer(self, layer: int) -> RankShape:
        """Return the shape with the sizes of the heads of a layer, by its number within the stage, as those of all."""
        config = self.config.of_layer(self.stage.first_layer + layer)
        return self if config is self.config else replace(self, stage=self.stage.model_copy(update={"config": config}))

    @property
    def tp(self) -> int:
        return self.stage.tp

    @property
    def moe_ep(self) -> int:
        return self.stage.moe_ep

    @property
    def moe_ep_rank(self) -> int:
        return self.tp_rank % self.moe_ep

    @property
    def num_experts(self) -> int:
        """Experts of the rank."""
        assert self.config.moe is not None
        return self.config.moe.num_experts // self.moe_ep

    @property
    def first_expert(self) -> int:
        """Number of the rank's first expert among those of all ranks."""
        return self.moe_ep_rank * self.num_experts

    @property
    def num_heads(self) -> int:
        return self.config.num_attention_heads // self.tp

    @property
    def num_kv_heads(self) -> int:
        return self.config.kv_heads_per_rank(self.tp)

    @property
    def caches(self) -> tuple[str, ...]:
        """Names of a layer's cache tensors."""
        return ("key", "value") if self.halved else self.config.caches

    @property
    def cache_head_size(self) -> int:
        """Number of elements that a cache tensor holds of a token and key/value head."""
        return self.config.cache_head_size // 2 if self.halved and self.config.is_latent else self.config.cache_head_size

    @property
    def kv_cache(self) -> KvCacheFormat | None:
        """Number format of the KV cache; None: the graph's dtype."""
        return self.stage.quantization.kv_cache if self.stage.quantization else None

    @property
    def cache_dtype(self) -> str:
        """Dtype of the KV cache's inputs and outputs."""
        return {"INT8": "int8", "FP8": "float8", None: self.dtype}[self.kv_cache]

    def format_of(self, linear: str) -> LinearFormat | None:
        """Return the format of a linear, named as within the stage; None: not quantized."""
        if not linear.startswith("transformer.layers.") or linear.split(".", 3)[3] not in LINEARS:
            return None
        return self.stage.format_of(linear)
