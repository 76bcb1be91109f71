"""The MPI program's start, which every rank of every verification pays for."""

from __future__ import annotations

import subprocess
import sys

START = """
import sys
from orchestrator.work import verify_rank
assert verify_rank._collectives(None)
print(*sorted({"torch", "transformers"} & set(sys.modules)))
import transformers
"""


def test_rank_with_collectives_starts_without_torch_and_transformers() -> None:
    """They cost seconds; who wants them afterwards still gets them."""
    done = subprocess.run([sys.executable, "-c", START], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr[-2000:]
