"""Where a release came from, in the words of SLSA 1.0 (https://slsa.dev/provenance/v1): field names are that format's own.

Holds names and digests; never credentials, and never more of an address than a reader may see.
"""

from __future__ import annotations

from typing import Any
from urllib.parse import urlsplit, urlunsplit

from pydantic import BaseModel, ConfigDict, Field

PREDICATE_TYPE = "https://slsa.dev/provenance/v1"
BUILD_TYPE = "urn:trt-orchestrator:build:v1"
BUILDER_ID = "urn:trt-orchestrator"


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="allow")


class ResourceDescriptor(_Record):
    """Something that went into the build."""

    uri: str | None = None
    name: str | None = None
    digest: dict[str, str] = Field(default_factory=dict)
    """Algorithm to hexadecimal digest; empty where only `annotations` identify it."""
    annotations: dict[str, Any] = Field(default_factory=dict)


class BuildDefinition(_Record):
    """What was asked for, and what it was made from."""

    buildType: str = BUILD_TYPE  # noqa: N815
    externalParameters: dict[str, Any]  # noqa: N815
    """The build spec."""
    internalParameters: dict[str, Any] = Field(default_factory=dict)  # noqa: N815
    resolvedDependencies: tuple[ResourceDescriptor, ...]  # noqa: N815
    """Files of the source, the calibration artifact, TensorRT's package."""


class Builder(_Record):
    """Who ran it."""

    id: str = BUILDER_ID
    version: dict[str, str]
    """Package to version, of everything that touched the engines."""


class BuildMetadata(_Record):
    """When it ran."""

    invocationId: str  # noqa: N815
    startedOn: str | None = None  # noqa: N815
    """Of the first step that this release is made of; it may have run for another release."""
    finishedOn: str  # noqa: N815


class RunDetails(_Record):
    """How it ran."""

    builder: Builder
    metadata: BuildMetadata


class Provenance(_Record):
    """The predicate of an in-toto statement whose subjects are the manifest's files."""

    predicateType: str = PREDICATE_TYPE  # noqa: N815
    buildDefinition: BuildDefinition  # noqa: N815
    runDetails: RunDetails  # noqa: N815


def public_uri(place: str) -> str:
    """A place without user, password, query and fragment: those may be secrets. A folder is named by its last part alone."""
    parts = urlsplit(place)
    if not parts.scheme or parts.scheme == "file":
        return "file:" + parts.path.rstrip("/").rpartition("/")[2]
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def identified(name: str, identity: str) -> ResourceDescriptor:
    """A file by its identity: sha256:..., or something weaker such as etag:... or mtime:..., which is no digest."""
    kind, _, value = identity.partition(":")
    if kind == "sha256":
        return ResourceDescriptor(name=name, digest={"sha256": value})
    return ResourceDescriptor(name=name, annotations={"identity": identity})
