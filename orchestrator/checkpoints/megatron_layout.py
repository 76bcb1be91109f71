"""Where Megatron-Bridge and NeMo 2 put the parts of a checkpoint."""

from __future__ import annotations

import re
from dataclasses import dataclass

from orchestrator.checkpoints.torch_dist import METADATA

_ITERATION = re.compile(rf"(iter_\d+)/{re.escape(METADATA)}")


@dataclass(frozen=True, slots=True)
class Layout:
    """Places of a checkpoint's parts."""

    weights: str
    """Folder of .metadata and .distcp files, ending in /, or empty for the checkpoint's own."""
    config: str
    """File of the run's config."""
    section: str
    """Key of the model's arguments in it."""


BRIDGE = Layout("", "run_config.yaml", "model")
"""A folder iter_NNNNNNN of Megatron-Bridge (training/checkpointing.py)."""
NEMO = Layout("weights/", "context/model.yaml", "config")
"""A folder of NeMo 2 (lightning/io/mixin.py)."""
TOKENIZER_FOLDERS = ("tokenizer/", "context/nemo_tokenizer/")
"""Where Megatron-Bridge and NeMo 2 keep a tokenizer of Hugging Face's."""


def layout_of(names: list[str]) -> Layout | None:
    """Return the layout of a folder with files `names`; None: it holds no distributed checkpoint."""
    for layout in (NEMO, BRIDGE):
        shards = any(name.endswith(".distcp") and name.rpartition("/")[0] == layout.weights.rstrip("/") for name in names)
        if layout.weights + METADATA in names and shards:
            return layout
    return None


def iterations(names: list[str]) -> list[str]:
    """Return the folders of iterations in a folder of a run."""
    return sorted(found[1] for name in names if (found := _ITERATION.fullmatch(name)))
