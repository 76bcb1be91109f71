"""Base class and bounded field types of stored records: manifests and their parts."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

LARGEST = 2**63 - 1
Count = Annotated[int, Field(ge=0, le=LARGEST)]
Size = Annotated[int, Field(ge=-LARGEST, le=LARGEST)]
Word = Annotated[str, Field(max_length=256)]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class Record(BaseModel):
    """Frozen record that keeps fields added by a newer writer."""

    model_config = ConfigDict(frozen=True, extra="allow")
