"""Execute a release's TensorRT engines: one process and one GPU per rank.

    torchrun --nproc-per-node 4 -m orchestrator.runners.tensorrt FOLDER --tokens 1,15043,3186

Ranks of a stage exchange inside their engines, by the stage's NCCL communicator. Hidden states go from stage to stage by a
communicator of two ranks. The last stage's first rank samples, and the token ids return to all ranks by a communicator of them all.
Every rank runs the same loop on the same prompts, so the token ids are all that it must be told.
"""

from __future__ import annotations

from orchestrator.runners.tensorrt.communicators import FileRendezvous, KnownIds, Rendezvous, StoreRendezvous
from orchestrator.runners.tensorrt.libraries import Libraries, open_libraries
from orchestrator.runners.tensorrt.runner import EngineRunner

__all__ = [
    "EngineRunner",
    "FileRendezvous",
    "KnownIds",
    "Libraries",
    "Rendezvous",
    "StoreRendezvous",
    "open_libraries",
]
