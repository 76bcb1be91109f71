"""Base and bounded types of records that outlive a program: manifests, and what they are made of."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

LARGEST = 2**63 - 1
Count = Annotated[int, Field(ge=0, le=LARGEST)]
Size = Annotated[int, Field(ge=-LARGEST, le=LARGEST)]
Word = Annotated[str, Field(max_length=256)]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class Record(BaseModel):
    """A frozen record that keeps fields that a newer writer added."""

    model_config = ConfigDict(frozen=True, extra="allow")
