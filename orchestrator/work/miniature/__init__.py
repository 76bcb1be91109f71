"""Prove the reading of a config.json: a small model of it computes the same here as in transformers.

Verification reads a few dozen tokens with the real weights: no text leaves a window or exceeds a trained length. The miniature
has the model's config with widths, layers and lengths scaled down and seeded weights. So it crosses every length that the config
names, on one rank and on several, in prefill and while decoding. It needs no weights and takes seconds.
"""

from __future__ import annotations

from orchestrator.planning.facts import MiniatureFacts
from orchestrator.planning.options import MiniatureOptions
from orchestrator.planning.steps import Task
from orchestrator.work.context import Context
from orchestrator.work.miniature.proof import prove


def miniature(task: Task, context: Context) -> MiniatureFacts:
    """Run the proof. Facts: errors by layout, and the thresholds that were crossed. Raises MiniatureError."""
    import transformers

    options = MiniatureOptions.model_validate(task.step.options)
    context.tools["transformers"] = transformers.__version__
    found = prove(options, context.scratch, lambda done, total: context.report("miniature", done, total, "steps"))
    for case in found.cases:
        context.log(f"miniature: {case.ranks}: {case.num_positions} positions, relative error {case.max_relative_error:.2e}")
    return MiniatureFacts(miniature=found)
