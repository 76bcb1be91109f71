"""Print what `orchestrator family check` says of a right model, and of the same model by broken tables of its family.

python -m benchmarks.family_check [--model DIR]
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from orchestrator.families import FAMILIES
from orchestrator.family_check import check_family
from tests.support.broken_families import BROKEN
from tests.support.families import write_tiny


def main() -> None:
    """Print the problems of each table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="Checkpoint of a Llama; absent: a tiny one of transformers.")
    arguments = parser.parse_args()
    right = FAMILIES["llama"]
    with tempfile.TemporaryDirectory(prefix="family-check-") as folder:
        source = arguments.model or str(write_tiny("llama", Path(folder, "model")))
        for broken, table in {"the table as it is": right, **BROKEN}.items():
            FAMILIES["llama"] = table
            problems = check_family(source).problems
            print(f"\n{broken}:" + ("" if problems else " nothing is missing"))
            for problem in problems:
                print(f"  {problem.message}\n    {problem.advice}")
    FAMILIES["llama"] = right


if __name__ == "__main__":
    main()
