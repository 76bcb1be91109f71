"""What the steps of each kind record in their outcomes."""

from __future__ import annotations

from orchestrator.base.records import Count, Record


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
