"""TensorRT-LLM's in-process API: one object per rank, without a cluster or a store.

    mapping = Mapping(tp_size=2, rank=0)
    model = LLaMAForCausalLM.from_hugging_face("llama-3-8b", dtype="bfloat16", mapping=mapping)
    model.save_checkpoint("checkpoint")
    build(model, BuildConfig(max_seq_len=4096)).save("engines")

`from_hugging_face` reads headers only. Tensors are cut out of the source when they are saved, built or requested, and quantized
then if `model.quantize(QuantizationSpec(algorithm="FP8"))` was called.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping as AbstractMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np

from orchestrator.base.dtypes import MODEL_DTYPES
from orchestrator.base.errors import ArchitectureError, SourceMissingError, WeightMapError
from orchestrator.checkpoints import read_source
from orchestrator.checkpoints.trtllm_files import write_checkpoint_config
from orchestrator.compat.rank_source import NO_LIMIT, RankSource, rank_options, writer
from orchestrator.engines.profiles import network_of, resolved
from orchestrator.engines.record import EngineRecord
from orchestrator.families import family_for
from orchestrator.families.wrappers import architecture_of
from orchestrator.model import topology as topologies
from orchestrator.model.checkpoint import CheckpointIndex, SourceFile
from orchestrator.model.compute_capability import check_target
from orchestrator.model.config import ModelConfig
from orchestrator.model.config_hugging_face import from_hugging_face
from orchestrator.model.config_trtllm import to_trtllm
from orchestrator.model.quantization import ModelQuantization
from orchestrator.model.stage import StageNetwork, StageOptions
from orchestrator.model.topology import Topology
from orchestrator.model.weight_map import weight_map
from orchestrator.model.weight_names import check_names
from orchestrator.networks import Rendering, decoder_network
from orchestrator.planning.options import BuildOptions
from orchestrator.planning.plan import Inputs
from orchestrator.planning.preparation import source_dtype
from orchestrator.planning.quantization import read_checkpoint
from orchestrator.spec.build import BuildConfig, QuantizationSpec
from orchestrator.work.binding import STORED
from orchestrator.work.build.step import compile_rank
from orchestrator.work.shards import Weight, map_checkpoint_rank

__all__ = [
    "BuildConfig",
    "DecoderModelForCausalLM",
    "Engine",
    "LLaMAForCausalLM",
    "Mapping",
    "MistralForCausalLM",
    "PretrainedModel",
    "QuantizationSpec",
    "TopModelMixin",
    "build",
]


@dataclass(frozen=True)
class Mapping:
    """A topology and a rank in it, under TensorRT-LLM's name."""

    tp_size: int = 1
    pp_size: int = 1
    rank: int = 0
    pp_partition: tuple[int, ...] | None = None
    moe_ep_size: int = 1
    cp_size: int = 1

    @property
    def topology(self) -> Topology:
        return Topology(self.tp_size, self.pp_size, self.pp_partition, self.moe_ep_size, self.cp_size)

    @property
    def tp_rank(self) -> int:
        return self.topology.coordinates(self.rank).tp_rank

    @property
    def pp_rank(self) -> int:
        return self.topology.coordinates(self.rank).pp_rank

    @property
    def file_number(self) -> int:
        """The N of rank{N}.safetensors with this rank's weights, which context-parallel ranks share."""
        return self.topology.file_number(self.tp_rank, self.pp_rank)


class PretrainedModel:
    """One rank of a model: config, mapping, and weights that are made when they are needed."""

    def __init__(self, config: ModelConfig, mapping: Mapping) -> None:
        """Create a rank without weights. Raises TopologyError when `mapping` does not fit the model."""
        topologies.check(mapping.topology, config.limits())
        self.config, self.mapping = config, mapping
        self.quantization: ModelQuantization | None = None
        self._weights: AbstractMapping[str, Weight] | None = None
        self._source: RankSource | None = None

    @property
    def stage(self) -> StageOptions:
        return StageOptions.of(self.config, self.mapping.topology, self.mapping.pp_rank, self.quantization)

    @classmethod
    def from_checkpoint(cls, checkpoint: str | os.PathLike[str], rank: int = 0) -> Self:
        """Memory-map a rank of a TensorRT-LLM checkpoint folder. Raises SpecError, SourceMissingError."""
        folder = Path(checkpoint)
        config, topology, quantization = read_checkpoint(folder)
        model = cls(config, Mapping(topology.tp, topology.pp, rank, topology.pp_partition, topology.moe_ep, topology.cp))
        model.quantization = quantization
        model.load(map_checkpoint_rank(folder, model.mapping.file_number))
        return model

    def required_names(self) -> dict[str, tuple[int, ...]]:
        """Return the name and the shape on this rank of every tensor that it needs."""
        return {name: shape for name, (shape, _) in self._required().items()}

    def _required(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Return name -> shape, safetensors dtype."""
        shortest = StageNetwork(stage=self.stage, max_seq_len=1)
        network = decoder_network(shortest, self.mapping.tp_rank, Rendering.compiled(shortest))
        kinds = network.weight_dtypes()
        return {
            tensor.name: (tuple(tensor.dims), STORED[kinds[tensor.name]])
            for tensor in network.model.graph.initializer
            if tensor.name in kinds
        }

    def load(self, weights: AbstractMapping[str, Any]) -> None:
        """Set this rank's tensors by TensorRT-LLM's names: torch tensors, numpy arrays, or mapped weights.

        Ignores names that the rank does not need. Raises WeightMapError for a missing tensor, or for another shape or dtype than
        the config's.
        """
        required = self._required()
        missing = sorted(set(required) - set(weights))
        if missing:
            raise WeightMapError(f"Required but not provided tensors: {', '.join(missing)}", "Names are those of required_names().")
        taken = {name: _as_weight(name, weights[name]) for name in required}
        for name, weight in taken.items():
            shape, dtype = required[name]
            if weight.shape != shape:
                raise WeightMapError(f"{name} is {list(weight.shape)}, this rank needs {list(shape)}")
            if weight.dtype != dtype:
                raise WeightMapError(f"{name} is {weight.dtype}, this rank needs {dtype}", "Cast the weights first.")
        self._weights, self._source = taken, None

    def weights(self) -> AbstractMapping[str, Weight]:
        """Return every tensor of this rank, cut out of the source at the first call. Raises SourceMissingError without a source."""
        if self._weights is None:
            if self._source is None:
                raise SourceMissingError("this model has no weights", "Call load(), or make it with from_hugging_face().")
            self._weights = self._source.materialize()
        return self._weights

    def quantize(self, quantization: QuantizationSpec) -> None:
        """Quantize the weights when they are cut out of the source; calibrate first where the algorithm needs it.

        In an MPI program (mpi4py), every rank of COMM_WORLD must call this with the same `quantization`. Model Optimizer runs on
        rank 0, for the whole model or for each of `calibration.num_stages` parts; the other ranks wait for the scales. Raises
        SourceMissingError for a model without a source, QuantizationError, SpecError and the source's errors. An error on one rank
        is raised on all.
        """
        from orchestrator.compat.calibrating import prepared, scales_for_all

        topology = self.mapping.topology

        def prepare() -> Inputs:
            if self._source is None:
                raise SourceMissingError("this model has no source to quantize", "Make it with from_hugging_face().")
            return self._source.inputs(self.config, topology, quantization)

        inputs, steps = prepared(prepare, topology)
        scales = scales_for_all(inputs, steps)
        assert self._source is not None
        self._source = self._source.quantized(inputs, topology, self.mapping.rank, scales)
        self.quantization, self._weights = inputs.model_quantization, None

    def save_checkpoint(self, output_dir: str | os.PathLike[str], save_config: bool = True) -> None:
        """Stream rank{N}.safetensors, and write config.json with `save_config`, which one rank needs to do. Raises StoreError.

        Context-parallel ranks share a file, which one of them needs to write.
        """
        folder = Path(output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        name = f"rank{self.mapping.file_number}.safetensors"
        if self._source is not None and self._weights is None:
            self._source.write(folder / name)
        else:
            self._write_loaded(folder / name)
        if save_config:
            write_checkpoint_config(folder, self.config, self.mapping.topology, self.quantization)

    def _write_loaded(self, path: Path) -> None:
        from orchestrator.checkpoints.safetensors import encode_header

        weights = self.weights()
        header = encode_header(((name, weight.dtype, weight.shape) for name, weight in weights.items()), {"format": "pt"})
        with writer(path) as file:
            file.write(header)
            for weight in weights.values():
                file.write(weight.data.data)


class TopModelMixin:
    """Mixin for models that are read from a folder of a checkpoint: Hugging Face's, NeMo's, KerasHub's, or Orbax's."""

    architectures: ClassVar[tuple[str, ...]] = ()
    """Architectures that the class accepts; empty: all known ones."""

    @classmethod
    def from_hugging_face(cls, hf_model_dir: str | os.PathLike[str], dtype: str = "auto", mapping: Mapping | None = None) -> Self:
        """Return one rank of the model in `hf_model_dir`. Reads headers only, and writes nothing.

        Raises the source's errors, ArchitectureError, TopologyError, WeightMapError.
        """
        folder = Path(hf_model_dir).resolve()
        return cls._from_source(folder, *read_source(str(folder)), dtype, mapping)

    @classmethod
    def from_nemo(cls, nemo_ckpt_dir: str | os.PathLike[str], dtype: str = "auto", mapping: Mapping | None = None) -> Self:
        """Return one rank of the model in a distributed checkpoint of NeMo 2 or Megatron-Bridge.

        Raises as from_hugging_face does.
        """
        folder = Path(nemo_ckpt_dir).resolve()
        return cls._from_source(folder, *read_source(str(folder), "megatron"), dtype, mapping)

    @classmethod
    def from_keras(cls, preset_dir: str | os.PathLike[str], dtype: str = "auto", mapping: Mapping | None = None) -> Self:
        """Return one rank of the model in a preset of KerasHub. Raises as from_hugging_face does, and ToolError without h5py."""
        folder = Path(preset_dir).resolve()
        return cls._from_source(folder, *read_source(str(folder), "keras"), dtype, mapping)

    @classmethod
    def from_jax(cls, checkpoint_dir: str | os.PathLike[str], dtype: str = "auto", mapping: Mapping | None = None) -> Self:
        """Return one rank of the model in a folder with config.json and a checkpoint of Orbax: MaxText's, or Gemma's in Flax.

        Raises as from_hugging_face does, and ToolError without TensorStore.
        """
        folder = Path(checkpoint_dir).resolve()
        return cls._from_source(folder, *read_source(str(folder), "orbax"), dtype, mapping)

    @classmethod
    def _from_source(
        cls, folder: Path, index: CheckpointIndex, extra_files: tuple[SourceFile, ...], dtype: str, mapping: Mapping | None
    ) -> Self:
        architecture = architecture_of(index.config, str(folder)) or "unknown"
        if cls.architectures and architecture not in cls.architectures:
            raise ArchitectureError(f"{folder} is a {architecture}", f"{cls.__name__} reads {', '.join(cls.architectures)}.")
        family = family_for(architecture)
        config = from_hugging_face(index.config, architecture, source_dtype(dtype, index), family.config)
        index = index.dequantized_to(MODEL_DTYPES[config.dtype])
        place = mapping or Mapping()
        topologies.check(place.topology, config.limits())
        check_names(family, config, place.topology)
        weights = weight_map(index, family, config, place.topology, NO_LIMIT)
        options = rank_options(weights, index, place.topology, place.rank)
        model = cls(config, place)  # type: ignore[call-arg]  # mixed into PretrainedModel
        model._source = RankSource(folder, index, extra_files, family, options)  # type: ignore[attr-defined]
        return model


class DecoderModelForCausalLM(PretrainedModel, TopModelMixin):
    """Any decoder of a known family."""


class LLaMAForCausalLM(DecoderModelForCausalLM):
    """Llama 1 to 3."""

    architectures = ("LlamaForCausalLM",)

    @classmethod
    def from_meta_ckpt(cls, meta_ckpt_dir: str | os.PathLike[str], dtype: str = "auto", mapping: Mapping | None = None) -> Self:
        """Return one rank of the model in a folder with Meta's params.json and consolidated.NN.pth.

        Raises as from_hugging_face does, and SourceMissingError without params.json.
        """
        folder = Path(meta_ckpt_dir).resolve()
        if not (folder / "params.json").is_file():
            raise SourceMissingError(f"{folder} is not in Meta's format: it has no params.json", "Use from_hugging_face.")
        return cls._from_source(folder, *read_source(str(folder), "meta"), dtype, mapping)


class MistralForCausalLM(DecoderModelForCausalLM):
    """Mistral."""

    architectures = ("MistralForCausalLM",)


def _as_weight(name: str, value: Any) -> Weight:
    """Return a torch tensor, numpy array or mapped weight as Weight, without a copy if it is contiguous."""
    if isinstance(value, Weight):
        return value
    if isinstance(value, np.ndarray):
        data, dtype, shape = np.ascontiguousarray(value), str(value.dtype), value.shape
        flat = data.reshape(-1).view(np.uint8)
    else:
        import torch

        if not isinstance(value, torch.Tensor):
            raise WeightMapError(f"{name} is a {type(value).__name__}", "Give torch tensors or numpy arrays.")
        dtype, shape = str(value.dtype).removeprefix("torch."), tuple(value.shape)
        flat = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    if dtype not in MODEL_DTYPES:
        raise WeightMapError(f"{name} has dtype {dtype}", "Weights are float16, bfloat16 or float32.")
    return Weight(MODEL_DTYPES[dtype], tuple(shape), flat)


@dataclass(frozen=True)
class Engine:
    """A compiled rank."""

    rank: int
    record: EngineRecord
    config: dict[str, Any]
    """{pretrained_config, build_config}, as in config.json of TensorRT-LLM's engine folders."""
    plan: bytes

    def save(self, engine_dir: str | os.PathLike[str]) -> None:
        """Write rank{N}.engine, and config.json on rank 0."""
        folder = Path(engine_dir)
        folder.mkdir(parents=True, exist_ok=True)
        with writer(folder / f"rank{self.rank}.engine", len(self.plan)) as file:
            file.write(self.plan)
        if self.rank == 0:
            (folder / "config.json").write_text(json.dumps(self.config, indent=4) + "\n")


def build(model: PretrainedModel, config: BuildConfig) -> Engine:
    """Compile the rank of `model` in this process.

    Raises EngineBuildError, ToolError, SpecError, TopologyError, QuantizationError for GPUs that lack a number format.
    """
    topologies.check_engines(model.mapping.topology)
    check_target(model.quantization, config.compute_capabilities)
    config = resolved(model.config, config)
    options = BuildOptions(
        network=network_of(model.stage, config), tp_rank=model.mapping.tp_rank, engine=config, tensorrt_version=None
    )
    chunks: list[bytes] = []
    log: list[str] = []
    record = compile_rank(options, model.weights(), lambda data: chunks.append(bytes(data)), lambda *_: None, log.append)
    pretrained = to_trtllm(model.config, model.mapping.topology, model.quantization)
    written = {"pretrained_config": pretrained, "build_config": config.model_dump(mode="json")}
    return Engine(model.mapping.rank, record, written, b"".join(chunks))
