"""A release of the tiny Llama for every layout, made once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.engine_release import release_of


@pytest.fixture(scope="session")
def release(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A pulled release by layout and sections of the spec."""
    made: dict[str, Path] = {}

    def make(tp: int, pp: int, **sections: Any) -> Path:
        key = f"{tp} {pp} {sections}"
        if key not in made:
            made[key] = release_of(tiny_llama, tmp_path_factory.mktemp("engines"), tp, pp, **sections)
        return made[key]

    return make
