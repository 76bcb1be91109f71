"""Releases for their consumers: read, pull, verify, tag, list, collect.

    from orchestrator.releases import pull

    pull("s3://bucket/engines/releases/llama/1", Path("/models/llama"), node=0, public_key=Path("pub.pem"))

Needs a store and a manifest; never Ray, torch, ONNX or TensorRT. Length and digests are checked before a file gets its name.
"""

from __future__ import annotations

from orchestrator.releases.collecting import Collected, collect
from orchestrator.releases.listing import Listed, list_releases
from orchestrator.releases.manifest import parse_parts
from orchestrator.releases.pulling import fetch, pull
from orchestrator.releases.reading import Release, open_release, read_release
from orchestrator.releases.tagging import tag
from orchestrator.releases.tags import Tag
from orchestrator.releases.verifying import Verified, check_files, verify

__all__ = [
    "Collected",
    "Listed",
    "Release",
    "Tag",
    "Verified",
    "check_files",
    "collect",
    "fetch",
    "list_releases",
    "open_release",
    "parse_parts",
    "pull",
    "read_release",
    "tag",
    "verify",
]
