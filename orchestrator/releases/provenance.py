"""Provenance of a release in SLSA 1.0 (https://slsa.dev/provenance/v1), with that format's field names.

Holds names and digests, never credentials, and only those parts of an address that every reader may see.
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
    """An input of the build."""

    uri: str | None = None
    name: str | None = None
    digest: dict[str, str] = Field(default_factory=dict)
    """Hexadecimal digest by algorithm; empty where only `annotations` identify the input."""
    annotations: dict[str, Any] = Field(default_factory=dict)


class BuildDefinition(_Record):
    """Parameters and inputs of the build."""

    buildType: str = BUILD_TYPE  # noqa: N815
    externalParameters: dict[str, Any]  # noqa: N815
    """The build spec."""
    internalParameters: dict[str, Any] = Field(default_factory=dict)  # noqa: N815
    resolvedDependencies: tuple[ResourceDescriptor, ...]  # noqa: N815
    """Files of the source, the calibration artifact, TensorRT's package."""


class Builder(_Record):
    """Program that ran the build."""

    id: str = BUILDER_ID
    version: dict[str, str]
    """Version of every package that touched the engines."""


class BuildMetadata(_Record):
    """Times of the build."""

    invocationId: str  # noqa: N815
    startedOn: str | None = None  # noqa: N815
    """Start of the first step that this release is made of; the step may have run for another release."""
    finishedOn: str  # noqa: N815


class RunDetails(_Record):
    """Builder and times of the build."""

    builder: Builder
    metadata: BuildMetadata


class Provenance(_Record):
    """The predicate of an in-toto statement whose subjects are the manifest's files."""

    predicateType: str = PREDICATE_TYPE  # noqa: N815
    buildDefinition: BuildDefinition  # noqa: N815
    runDetails: RunDetails  # noqa: N815


def public_uri(place: str) -> str:
    """Return a URL without user, password, query and fragment, which may be secret, or the last part of a folder."""
    parts = urlsplit(place)
    if not parts.scheme or parts.scheme == "file":
        return "file:" + parts.path.rstrip("/").rpartition("/")[2]
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def identified(name: str, identity: str) -> ResourceDescriptor:
    """Return a file with its identity: sha256:..., or something weaker such as etag:... or mtime:..., which is no digest."""
    kind, _, value = identity.partition(":")
    if kind == "sha256":
        return ResourceDescriptor(name=name, digest={"sha256": value})
    return ResourceDescriptor(name=name, annotations={"identity": identity})
