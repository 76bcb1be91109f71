"""A pipeline stage of a model, and the networks of its ranks."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from orchestrator.base.digest import digest_of
from orchestrator.model.config import ModelConfig
from orchestrator.model.quantization import LinearFormat, ModelQuantization, global_name
from orchestrator.model.topology import Topology


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
        """The format of a linear by its name within the stage (transformer.layers.0.mlp.fc); None: the model's precision."""
        if self.quantization is None:
            return None
        local = int(linear.split(".", 3)[2])
        return self.quantization.format_of(global_name(linear, local, self.first_layer + local))

    def rank(self, tp_rank: int) -> int:
        return self.pp_rank * self.tp + tp_rank


class StageNetwork(_Options):
    """The networks of a pipeline stage: everything that the graphs of its ranks follow from.

    What is compiled and what is executed are renderings of it (`networks.Rendering`). Both record the digest of the rank's
    network, and a release whose engine and verification record different ones is not published.
    """

    stage: StageOptions
    max_seq_len: int
    """Positions that a sequence may have: rows of the rotary tables, slots of the compiled KV cache."""
    gather_logits: bool = True
    """Every tensor-parallel rank returns the logits of the whole vocabulary; False: those of its own slice."""

    def digest(self, tp_rank: int) -> str:
        """Identity of the network of one rank."""
        return digest_of({"network": self.model_dump(mode="json"), "tp_rank": tp_rank})
