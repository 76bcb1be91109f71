"""Compare two sets of logits."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from orchestrator.base.errors import VerificationError
from orchestrator.planning.facts import Verification
from orchestrator.spec.build import ToleranceSpec

Floats = npt.NDArray[np.floating]
Integers = npt.NDArray[np.integer]


def compare(logits: Floats, reference: Floats, next_tokens: Integers | None = None) -> Verification:
    """Compare [positions, vocabulary] with the reference of the same shape.

    `next_tokens` [positions]: the text's next token, -1 at its end; None: no perplexity.

    The relative error of a position is max |logit - reference| / max |reference|; the worst is reported. KL is
    KL(reference || logits) in nats, averaged. Our non-finite values count as infinitely wrong. Raises VerificationError for a
    reference that is not finite, because it proves nothing.
    """
    ours, theirs = logits.astype(np.float64), reference.astype(np.float64)
    if not np.isfinite(theirs).all():
        raise VerificationError(
            "the reference model's own logits are not finite",
            _NOT_PUBLISHED + "Compare the checksums of the source's weights with the publisher's.",
        )
    if not np.isfinite(ours).all():
        return Verification(
            num_positions=len(ours), max_absolute_error=1e300, max_relative_error=1e300, mean_kl=1e300, top1_agreement=0.0
        )
    difference = np.abs(ours - theirs).max(axis=-1)
    scale = np.maximum(np.abs(theirs).max(axis=-1), np.finfo(np.float32).tiny)
    log_p, log_q = _log_softmax(theirs), _log_softmax(ours)
    divergence = (np.exp(log_p) * (log_p - log_q)).sum(axis=-1)
    return Verification(
        num_positions=len(ours),
        max_absolute_error=float(difference.max()),
        max_relative_error=float((difference / scale).max()),
        mean_kl=float(max(divergence.mean(), 0.0)),
        top1_agreement=float((ours.argmax(axis=-1) == theirs.argmax(axis=-1)).mean()),
        perplexity_ratio=None if next_tokens is None else _perplexity_ratio(log_q, log_p, next_tokens),
    )


def _perplexity_ratio(ours: Floats, theirs: Floats, next_tokens: Integers) -> float | None:
    """Return the ratio of both perplexities, exp(mean negative log-likelihood); None when no token follows any position."""
    known = np.flatnonzero(next_tokens >= 0)
    if not known.size:
        return None
    difference = theirs[known, next_tokens[known]] - ours[known, next_tokens[known]]
    return float(np.exp(difference.mean()))


def _log_softmax(values: Floats) -> Floats:
    shifted = values - values.max(axis=-1, keepdims=True)
    result: Floats = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return result


_NOT_PUBLISHED = "Nothing was published. "
_QUANTIZED = (
    "The quantization costs more than verification.tolerance allows: compare others (`orchestrator quantize SPEC --sweep all`), "
    "calibrate on more text, leave sensitive layers out (quant_cfg), or raise the tolerance."
)
_EXACT = (
    "An exact conversion does not compute what the model computes: check that config.json belongs to these weights and that "
    "source.family is right; if both are, this is a bug: report it, with config.json."
)
_RANDOM = " The source has no tokenizer, so random tokens were compared. Add one: on real text, a quantization costs less."


def advice(*, quantized: bool, text: bool) -> str:
    """Return the advice for a verification above tolerance. `text`: the model read text, not random tokens."""
    return _NOT_PUBLISHED + (_QUANTIZED + ("" if text else _RANDOM) if quantized else _EXACT)


def relative_error(found: Floats, expected: Floats) -> float:
    """Return the largest over rows of max |found - expected| / max |expected|; infinite where a value is not finite."""
    if not np.isfinite(found).all():
        return float("inf")
    difference = np.abs(found.astype(np.float64) - expected).max(axis=-1)
    return float((difference / np.maximum(np.abs(expected).max(axis=-1), np.finfo(np.float32).tiny)).max())


_NOISE, _JUMP = 1e-6, 20.0
"""Largest error of a right layer, and the factor by which a wrong layer must increase the error."""


def where(layer_errors: Mapping[int, float]) -> str:
    """Describe the layer in which the error of the hidden states arises, for a message; also when no layer stands out."""
    before = _NOISE
    for layer, error in sorted(layer_errors.items()):
        if error > _JUMP * before:
            return f"the error jumps in layer {layer}, from {before:.1e} to {error:.1e}"
        before = max(error, _NOISE)
    worst = max(layer_errors.values(), default=0.0)
    if worst > _JUMP * _NOISE:
        return f"no layer stands out: the hidden states drift apart, by {worst:.1e} at the last layer"
    return f"the layers are right, within {worst:.1e}: the fault lies in the last norm or the head"


def check(found: Verification, tolerance: ToleranceSpec, advice: str = "", place: str = "") -> None:
    """Check the numbers. Raises VerificationError with every number above tolerance, and the `place` where the error arises."""
    problems = []
    if tolerance.max_relative_error is not None and found.max_relative_error > tolerance.max_relative_error:
        problems.append(f"relative error {found.max_relative_error:.3g} > {tolerance.max_relative_error:g}")
    if found.mean_kl > tolerance.max_mean_kl:
        problems.append(f"mean KL {found.mean_kl:.3g} > {tolerance.max_mean_kl:g}")
    if found.top1_agreement < tolerance.min_top1_agreement:
        problems.append(f"top-1 agreement {found.top1_agreement:.4f} < {tolerance.min_top1_agreement:g}")
    if problems:
        said = "; ".join(filter(None, (", ".join(problems), place)))
        raise VerificationError(f"the engines' graphs differ from the reference on {found.num_positions} positions: {said}", advice)
