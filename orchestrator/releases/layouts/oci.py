"""An OCI image layout with ModelPack's media types: blobs by digest, index.json last. Pushing copies files; nothing is packed.

Formats: OCI image-spec 1.1 (image layout, manifest with artifactType) and CNCF model-spec v1, with raw layers and the path of each
in an annotation.
"""

from __future__ import annotations

import json
from typing import Any

from orchestrator.base.digest import canonical_json, digest_bytes
from orchestrator.releases.layouts import Arrangement, Request, identity_files
from orchestrator.releases.manifest import FileRecord, Manifest

_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
_INDEX = "application/vnd.oci.image.index.v1+json"
_ARTIFACT = "application/vnd.cncf.model.manifest.v1+json"
_CONFIG = "application/vnd.cncf.model.config.v1+json"
_WEIGHT = "application/vnd.cncf.model.weight.v1.raw"
_WEIGHT_CONFIG = "application/vnd.cncf.model.weight.config.v1.raw"
_DOC = "application/vnd.cncf.model.doc.v1.raw"
_FILEPATH = "org.cncf.model.filepath"
_FILE_METADATA = "org.cncf.model.file.metadata+json"
_REGULAR_FILE = ord("0")
"""tar's typeflag of a regular file."""


def arrange(request: Request) -> Arrangement:
    """See Layout."""
    blobs: dict[str, bytes] = {}
    layers = [_layer(request.manifest, file.path, _kind(file), file.sha256, file.num_bytes) for file in request.files]
    for name, data in identity_files(request).items():
        layers.append(_layer(request.manifest, name, _DOC, digest_bytes(data), len(data)))
        blobs[_blob(digest_bytes(data))] = data
    config = canonical_json(_config(request.manifest, layers))
    manifest = canonical_json(
        {
            "schemaVersion": 2,
            "mediaType": _MANIFEST,
            "artifactType": _ARTIFACT,
            "config": _descriptor(_CONFIG, digest_bytes(config), len(config)),
            "layers": layers,
        }
    )
    index = {
        "schemaVersion": 2,
        "mediaType": _INDEX,
        "manifests": [
            {
                **_descriptor(_MANIFEST, digest_bytes(manifest), len(manifest)),
                "artifactType": _ARTIFACT,
                "annotations": {"org.opencontainers.image.ref.name": request.manifest.version},
            }
        ],
    }
    written = {
        **blobs,
        _blob(digest_bytes(config)): config,
        _blob(digest_bytes(manifest)): manifest,
        "oci-layout": json.dumps({"imageLayoutVersion": "1.0.0"}).encode(),
        "index.json": json.dumps(index, indent=1).encode(),
    }
    return Arrangement({file.path: _blob(file.sha256) for file in request.files}, written)


def _blob(digest: str) -> str:
    return f"blobs/sha256/{digest}"


def _kind(file: FileRecord) -> str:
    return _WEIGHT if file.role == "engine" else _WEIGHT_CONFIG


def _descriptor(media_type: str, digest: str, num_bytes: int) -> dict[str, Any]:
    return {"mediaType": media_type, "digest": f"sha256:{digest}", "size": num_bytes}


def _layer(manifest: Manifest, path: str, media_type: str, digest: str, num_bytes: int) -> dict[str, Any]:
    metadata = {
        "name": path, "mode": 0o644, "uid": 0, "gid": 0, "size": num_bytes, "mtime": manifest.created_at, "typeflag": _REGULAR_FILE,
    }  # fmt: skip
    annotations = {_FILEPATH: path, _FILE_METADATA: canonical_json(metadata).decode()}
    return {**_descriptor(media_type, digest, num_bytes), "annotations": annotations}


def _config(manifest: Manifest, layers: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the model's config blob. Raw layers are their own diffs."""
    return {
        "descriptor": {"createdAt": manifest.created_at, "name": manifest.name, "version": manifest.version},
        "config": {
            "architecture": "transformer",
            "format": "tensorrt",
            "precision": manifest.model.dtype,
            **({"quantization": manifest.selectors.precision} if manifest.quantization else {}),
        },
        "modelfs": {"type": "layers", "diffIds": [layer["digest"] for layer in layers]},
    }
