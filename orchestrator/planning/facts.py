"""What the steps of each kind record in their outcomes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel, ConfigDict

from orchestrator.base.records import Count, Record
from orchestrator.engines.record import EngineRecord
from orchestrator.planning.kinds import Kind
from orchestrator.planning.options import BuildOptions


class Verification(Record):
    """How far float32 execution of the ranks' graphs was from the reference."""

    num_positions: Count
    max_absolute_error: float
    max_relative_error: float
    max_relative_error_to_source: float | None = None
    """The same against the source's weights as they are, not rounded to the build's dtype first: what the dtype costs is in it."""
    mean_kl: float
    top1_agreement: float
    perplexity_ratio: float | None = None
    """Of the text that was read: the graphs' perplexity over the reference's."""

    def relative_errors(self) -> str:
        """Both relative errors in words; the second only where rounding to the build's dtype makes it another number."""
        words, to_source = f"{self.max_relative_error:.2e}", self.max_relative_error_to_source
        if to_source is None or to_source == self.max_relative_error:
            return words
        return f"{words} ({to_source:.2e} against the source before rounding)"


class MiniatureCase(Record):
    """All texts of the miniature on one layout of ranks."""

    ranks: str
    """E.g. tp=2, ep=2."""
    num_prompts: int
    num_positions: int
    max_relative_error: float


class MiniatureThreshold(Record):
    """A length at which the model changes what it computes."""

    key: str
    """Key of config.json that names the length."""
    value: int
    tokens: int
    """In the miniature."""
    crossed: bool
    """False: no text of the miniature was long enough."""


class Miniature(Record):
    """How far the model, made small with seeded weights, was from transformers, in float32."""

    num_layers: int
    tolerance: float
    cases: tuple[MiniatureCase, ...]
    thresholds: tuple[MiniatureThreshold, ...]

    @property
    def max_relative_error(self) -> float:
        return max(case.max_relative_error for case in self.cases)

    def line(self) -> str:
        """One line for people."""
        lengths = {crossed: [each for each in self.thresholds if each.crossed is crossed] for crossed in (True, False)}
        crossed, not_crossed = (", ".join(f"{each.key} {each.value}" for each in lengths[which]) for which in (True, False))
        layouts = ", ".join(case.ranks.replace(", ", " ") for case in self.cases)
        return (
            f"miniature of {self.num_layers} layers: max relative error {self.max_relative_error:.2e} on {layouts}; "
            f"texts longer than {crossed or 'no threshold'}" + (f", none longer than {not_crossed}" if not_crossed else "")
        )


class Facts(BaseModel):
    """What every kind of step may record; fields of a newer program are kept."""

    model_config = ConfigDict(frozen=True, extra="allow")

    peak_memory_bytes: int = 0
    """Resident memory of the step's process; 0: not measured by the step itself."""
    profile: str = ""
    """Key of the step's Nsight Systems trace in the store; empty: it was not profiled."""


class ConvertFacts(Facts):
    """What a convert step saw while it read and wrote."""

    not_finite: tuple[str, ...] = ()
    """Source tensors that hold NaN or infinity."""
    quantization_errors: dict[str, float] = {}
    """Relative error of each quantized linear's weight."""
    source_bytes_read: int = 0


class CalibrateFacts(Facts):
    """What a calibrate step read, and how."""

    num_samples: int = 0
    num_tokens: int = 0
    num_linears: int = 0
    unseen: tuple[str, ...] = ()
    """Linears of experts that no token reached."""
    input_amax: dict[str, tuple[float, float, float]] = {}
    """Smallest, median and largest input_amax by the last part of the linear's name."""
    device: str = "cpu"
    load_seconds: float = 0.0
    peak_gpu_memory_bytes: int = 0


class ReferenceFacts(Facts):
    """What the source model read."""

    num_sequences: int = 0
    num_tokens: int = 0
    text: str = ""
    """What the tokens are: text, or random token ids."""


class BuildFacts(Facts):
    """What was compiled, from what."""

    engine: EngineRecord
    options: BuildOptions
    network: str | None = None
    """Digest of the rank's network."""


class VerifyFacts(Facts):
    """What was executed, and how far it was from the reference."""

    stage: int = 0
    networks: tuple[str, ...] = ()
    """Digest of the network of every tensor-parallel rank."""
    layer_errors: dict[int, float] = {}
    """Relative error of the hidden states at the end of every layer so far, those of earlier stages included."""
    verification: Verification | None = None
    """Of the logits; None: not the last stage."""


class MiniatureFacts(Facts):
    """What the miniature showed."""

    miniature: Miniature


_FACTS: dict[Kind, type[Facts]] = {
    Kind.MINIATURE: MiniatureFacts,
    Kind.REFERENCE: ReferenceFacts,
    Kind.CALIBRATE: CalibrateFacts,
    Kind.CONVERT: ConvertFacts,
    Kind.BUILD: BuildFacts,
    Kind.VERIFY: VerifyFacts,
}


def decode_facts(kind: Kind, plain: dict[str, Any]) -> Facts:
    """The facts of a kind of step; of a step that recorded none, empty ones."""
    return _FACTS[kind].model_validate(plain) if plain else Facts()


def linear_errors(facts: Iterable[Facts]) -> dict[str, float]:
    """Quantization error of every linear, the largest first."""
    errors: dict[str, float] = {}
    for each in facts:
        if isinstance(each, ConvertFacts):
            for linear, error in each.quantization_errors.items():
                errors[linear] = max(error, errors.get(linear, 0.0))
    return dict(sorted(errors.items(), key=lambda item: (-item[1], item[0])))
