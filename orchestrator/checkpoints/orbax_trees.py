"""Parameter trees that Orbax checkpoints hold: which array is which of Hugging Face's tensors."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from orchestrator.base.errors import ArchitectureError, abbreviated
from orchestrator.checkpoints.orbax_flax import FLAX, flax_gemma
from orchestrator.checkpoints.orbax_maxtext import MAXTEXT, maxtext
from orchestrator.checkpoints.orbax_parts import Tree


def tree_of(config: Mapping[str, Any], names: Collection[str], where: str) -> Tree:
    """Return the tree that the arrays `names` are of. Raises ArchitectureError, SourceCorruptError."""
    paths = [name.replace(".", "/") for name in names]
    architecture = (config.get("architectures") or ["unknown"])[0]
    if any("decoder/" in path and "token_embedder" not in path for path in paths):
        if architecture not in MAXTEXT:
            raise ArchitectureError(
                f"{where}: MaxText's {abbreviated(str(architecture), 60)} is not read", f"Read are {', '.join(MAXTEXT)}."
            )
        return maxtext(config, architecture, where)
    if any(re.search(r"(^|/)layer_\d+/attn/", path) for path in paths):
        if architecture not in FLAX:
            raise ArchitectureError(
                f"{where}: {abbreviated(str(architecture), 60)} in Flax is not read", f"Read are {', '.join(FLAX)}."
            )
        return flax_gemma(config, architecture, where)
    shown = ", ".join(abbreviated(name, 60) for name in sorted(names)[:3])
    raise ArchitectureError(f"{where} holds arrays of no known tree: {shown}", "Trees of MaxText and of Gemma in Flax are read.")
