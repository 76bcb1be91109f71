"""Results by family, which benchmarks write and `python -m docs.generate` renders as docs/models.md."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RECORD = Path(__file__).parents[1] / "docs" / "models.json"


def record(family: str, **facts: Any) -> None:
    """Put facts about a family into the record, in the place of earlier ones of the same names."""
    known: dict[str, dict[str, Any]] = recorded()
    known[family] = {**known.get(family, {}), **facts}
    lines = (f"{json.dumps(name)}: {json.dumps(known[name], sort_keys=True)}" for name in sorted(known))
    RECORD.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def recorded() -> dict[str, dict[str, Any]]:
    """Recorded facts, by family."""
    found: dict[str, dict[str, Any]] = json.loads(RECORD.read_text()) if RECORD.is_file() else {}
    return found
