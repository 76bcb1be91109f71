"""Table of a sweep over quantization algorithms."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from orchestrator.quantizing import SweepRow
from orchestrator.report.tables import format_bytes


def sweep_table(rows: Sequence[SweepRow]) -> Table:
    """Return a table of algorithms: size, distance from the unquantized model, the worst linear."""
    table = Table("algorithm", "checkpoint", "perplexity", "KL", "top-1", "worst linear", "its error", box=None, pad_edge=False)
    for row in rows:
        found = row.verification
        table.add_row(
            row.algorithm,
            format_bytes(row.checkpoint_bytes),
            "" if found.perplexity_ratio is None else f"x {found.perplexity_ratio:.3f}",
            f"{found.mean_kl:.2e}",
            f"{found.top1_agreement:.3f}",
            row.worst_linear,
            f"{row.worst_error:.3f}" if row.worst_linear else "",
        )
    return table
