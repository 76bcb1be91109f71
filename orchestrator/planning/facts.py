"""Facts that the steps of each kind record in their outcomes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel, ConfigDict

from orchestrator.base.records import Count, Record
from orchestrator.engines.record import EngineRecord
from orchestrator.planning.kinds import Kind
from orchestrator.planning.options import BuildOptions


class Verification(Record):
    """Difference between float32 execution of the ranks' graphs and the reference."""

    num_positions: Count
    max_absolute_error: float
    max_relative_error: float
    max_relative_error_to_source: float | None = None
    """max_relative_error against the source's weights without rounding to the build's dtype, so that it includes that rounding."""
    mean_kl: float
    top1_agreement: float
    perplexity_ratio: float | None = None
    """Perplexity of the graphs over that of the reference, on the verification text."""

    def relative_errors(self) -> str:
        """Return both relative errors as text; the second only if rounding to the build's dtype changes it."""
        words, to_source = f"{self.max_relative_error:.2e}", self.max_relative_error_to_source
        if to_source is None or to_source == self.max_relative_error:
            return words
        return f"{words} ({to_source:.2e} against the source before rounding)"

    def line(self) -> str:
        """Return the numbers as a line for people."""
        return (
            f"{self.num_positions} positions: max absolute error {self.max_absolute_error:.2e}, max relative error "
            f"{self.relative_errors()}, mean KL {self.mean_kl:.2e}, top-1 agreement {self.top1_agreement:.3f}"
        )


class MiniatureCase(Record):
    """Result of all texts of the miniature on one layout of ranks."""

    ranks: str
    """Layout of the ranks, e.g. tp=2, ep=2."""
    num_prompts: int
    num_positions: int
    max_relative_error: float


class MiniatureThreshold(Record):
    """A text length at which the model's computation changes."""

    key: str
    """Key of config.json that names the length."""
    value: int
    tokens: int
    """Length in the miniature."""
    crossed: bool
    """Whether a text of the miniature was longer."""


class Miniature(Record):
    """Difference between the model, made small with seeded weights, and transformers, in float32."""

    num_layers: int
    tolerance: float
    cases: tuple[MiniatureCase, ...]
    thresholds: tuple[MiniatureThreshold, ...]

    @property
    def max_relative_error(self) -> float:
        return max(case.max_relative_error for case in self.cases)

    def line(self) -> str:
        """Return a line for people."""
        lengths = {crossed: [each for each in self.thresholds if each.crossed is crossed] for crossed in (True, False)}
        crossed, not_crossed = (", ".join(f"{each.key} {each.value}" for each in lengths[which]) for which in (True, False))
        layouts = ", ".join(case.ranks.replace(", ", " ") for case in self.cases)
        return (
            f"miniature of {self.num_layers} layers: max relative error {self.max_relative_error:.2e} on {layouts}; "
            f"texts longer than {crossed or 'no threshold'}" + (f", none longer than {not_crossed}" if not_crossed else "")
        )


class Facts(BaseModel):
    """Facts that every kind of step may record. Fields of newer programs are kept."""

    model_config = ConfigDict(frozen=True, extra="allow")

    peak_memory_bytes: int = 0
    """Peak resident memory of the step's process; 0: not measured by the step."""
    profile: str = ""
    """Key of the step's Nsight Systems trace in the store; empty: not profiled."""


class ConvertFacts(Facts):
    """Facts of a convert step."""

    not_finite: tuple[str, ...] = ()
    """Source tensors that hold NaN or infinity."""
    quantization_errors: dict[str, float] = {}
    """Quantized linear -> relative error of its weight."""
    source_bytes_read: int = 0


class CalibrateFacts(Facts):
    """Facts of a calibrate step."""

    num_samples: int = 0
    num_tokens: int = 0
    num_linears: int = 0
    unseen: tuple[str, ...] = ()
    """Linears of experts that no token reached."""
    input_amax: dict[str, tuple[float, float, float]] = {}
    """Last part of the linear's name -> smallest, median and largest input_amax."""
    device: str = "cpu"
    load_seconds: float = 0.0
    peak_gpu_memory_bytes: int = 0


class ReferenceFacts(Facts):
    """Facts of a reference step."""

    num_sequences: int = 0
    num_tokens: int = 0
    text: str = ""
    """Origin of the tokens: text, or random token ids."""


class BuildFacts(Facts):
    """Facts of a build step."""

    engine: EngineRecord
    options: BuildOptions
    network: str | None = None
    """Digest of the rank's network."""


class VerifyFacts(Facts):
    """Facts of a verify step."""

    stage: int = 0
    networks: tuple[str, ...] = ()
    """Digest of the network of every tensor-parallel rank."""
    layer_errors: dict[int, float] = {}
    """Layer -> relative error of the hidden states at its end, with the layers of earlier stages."""
    verification: Verification | None = None
    """Difference of the logits; None: not the last stage."""


class ExportFacts(Facts):
    """Facts of an export step."""

    networks: tuple[str, ...]
    """Digest of the network of every tensor-parallel rank that the graph holds."""
    max_relative_error: float | None = None
    """Difference to the result of the stage's verification; None: the build is not verified."""


class MiniatureFacts(Facts):
    """Facts of a miniature step."""

    miniature: Miniature


_FACTS: dict[Kind, type[Facts]] = {
    Kind.MINIATURE: MiniatureFacts,
    Kind.REFERENCE: ReferenceFacts,
    Kind.CALIBRATE: CalibrateFacts,
    Kind.CONVERT: ConvertFacts,
    Kind.BUILD: BuildFacts,
    Kind.VERIFY: VerifyFacts,
    Kind.EXPORT: ExportFacts,
}


def decode_facts(kind: Kind, plain: dict[str, Any]) -> Facts:
    """Decode the facts of a kind of step. An empty `plain` gives an empty Facts."""
    return _FACTS[kind].model_validate(plain) if plain else Facts()


def linear_errors(facts: Iterable[Facts]) -> dict[str, float]:
    """Return the quantization error of every linear, the largest first."""
    errors: dict[str, float] = {}
    for each in facts:
        if isinstance(each, ConvertFacts):
            for linear, error in each.quantization_errors.items():
                errors[linear] = max(error, errors.get(linear, 0.0))
    return dict(sorted(errors.items(), key=lambda item: (-item[1], item[0])))
