"""Options of a pipeline stage, and the networks of its ranks."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from orchestrator.base.digest import digest_of
from orchestrator.model.config import ModelConfig
from orchestrator.model.quantization import LinearFormat, ModelQuantization, global_name
from orchestrator.model.topology import Topology

ExpertForm = Literal["dense", "gathered", "trt_moe"]
"""Which of its experts a rank computes. dense: all; gathered: those that the call's tokens chose, until these are as many;
trt_moe: TensorRT's own layer, in place of which the verification executes the dense form."""


class _Options(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class StageOptions(_Options):
    """A pipeline stage of a model."""

    config: ModelConfig
    tp: int
    pp: int
    pp_rank: int
    first_layer: int
    num_layers: int
    moe_ep: int = 1
    quantization: ModelQuantization | None = None

    @property
    def is_first(self) -> bool:
        return self.pp_rank == 0

    @property
    def is_last(self) -> bool:
        return self.pp_rank == self.pp - 1

    @staticmethod
    def of(config: ModelConfig, topology: Topology, pp_rank: int, quantization: ModelQuantization | None = None) -> StageOptions:
        layers = topology.stages(config.num_hidden_layers)[pp_rank]
        return StageOptions(
            config=config,
            tp=topology.tp,
            pp=topology.pp,
            pp_rank=pp_rank,
            first_layer=layers.start,
            num_layers=len(layers),
            moe_ep=topology.moe_ep,
            quantization=quantization,
        )

    def format_of(self, linear: str) -> LinearFormat | None:
        """Return the format of a linear, named as within the stage (transformer.layers.0.mlp.fc); None: not quantized."""
        if self.quantization is None:
            return None
        local = int(linear.split(".", 3)[2])
        return self.quantization.format_of(global_name(linear, local, self.first_layer + local))

    def rank(self, tp_rank: int) -> int:
        return self.pp_rank * self.tp + tp_rank


class StageNetwork(_Options):
    """Networks of a pipeline stage, which determine the graphs of its ranks.

    The compiled and the executed graph are both renderings of it (`networks.Rendering`). Each records the digest of the rank's
    network, and a release is published only if the digests of engine and verification agree.
    """

    stage: StageOptions
    max_seq_len: int
    """Largest number of positions per sequence: rows of the rotary tables."""
    gather_logits: bool = True
    """Whether every tensor-parallel rank returns the logits of the whole vocabulary, not only of its slice."""
    experts: ExpertForm = Field("dense", exclude_if=lambda value: value == "dense")
    """Form of the experts; dense without experts."""

    @property
    def cache_slots(self) -> int:
        """Slots of the compiled KV cache."""
        return self.stage.config.cache_slots(self.max_seq_len)

    def digest(self, tp_rank: int) -> str:
        """Return the digest of the network of one rank."""
        return digest_of({"network": self.model_dump(mode="json"), "tp_rank": tp_rank})
