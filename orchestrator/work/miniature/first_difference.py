"""Where our model and transformers' first part: the layer and the part of it."""

from __future__ import annotations

from typing import Any

import numpy as np

from orchestrator.work.miniature.model import Floats, parts_of
from orchestrator.work.miniature.prompts import Prompt
from orchestrator.work.miniature.ranks import PartOfModel, Ranks


def first_difference(model: Any, ranks: Ranks, prompt: Prompt, tolerance: float) -> str:
    """Return a sentence that names the first part whose relative error exceeds `tolerance` on a text; empty: all parts agree.

    `ranks` observe their parts. A part is compared by its largest difference over its largest value.
    """
    ranks.logits(prompt)
    theirs = parts_of(model, prompt.calls())
    for part, ours in ranks.parts.items():
        expected = theirs.get(part)
        if expected is None:
            continue
        if ours.shape != expected.shape:
            return f"{_named(part)} is {list(ours.shape)} here, {list(expected.shape)} in transformers. "
        error = _error(ours, expected)
        if not error <= tolerance:
            return f"The first part that differs: {_named(part)} (relative error {error:.2g}). "
    return "All layers agree: suspect the last norm, the head and what scales or caps the logits. "


def _error(ours: Floats, theirs: Floats) -> float:
    scale = max(float(np.abs(theirs).max()), float(np.finfo(np.float32).tiny))
    return float(np.abs(ours.astype(np.float64) - theirs).max() / scale)


def _named(part: PartOfModel) -> str:
    layer, what = part
    if layer is None:
        return f"the {what}"
    return f"the end of layer {layer}" if what == "end" else f"{what} of layer {layer}"
