"""Explain why a build differs from the one published under its name: file by file and field by field."""

from __future__ import annotations

from typing import Any

from orchestrator.model.checkpoint import SourceFile
from orchestrator.planning.plan import Plan
from orchestrator.releases.describe import public_spec
from orchestrator.releases.manifest import Manifest, SourceFileRecord

_MOST = 5
_TIME = "mtime"
_ADDRESS = ("release.name", "release.version", "source.path", "source.tokenizer")
"""Fields of a spec that do not change what is built."""
_KINDS = {
    "sha256": "its content", "md5": "its content", "etag": "its ETag", _TIME: "its time of modification",
    "time": "its time of modification", "size": "its size",
}  # fmt: skip


def differences(published: Manifest, plan: Plan) -> list[str]:
    """Return the differences: files of the source, else fields of the spec, else versions."""
    now = {file.name: file for file in plan.inputs.index.files + plan.inputs.extra_files}
    then = {file.path: file for file in published.source}
    files = [
        f"{name}: {how}" for name in sorted({*now, *then}) if (how := _of_file(now.get(name), then.get(name))) is not None
    ]  # fmt: skip
    asked = _flat(published.provenance.buildDefinition.externalParameters)
    fields = [
        f"{name}: {_short(value)}, then {_short(asked.get(name))}"
        for name, value in _flat(public_spec(plan.spec)).items()
        if value != asked.get(name) and name not in _ADDRESS
    ]
    found = [*files, *fields]
    backend = plan.spec.engine.backend
    if plan.inputs.tensorrt_version and published.tools.get(backend) not in (None, plan.inputs.tensorrt_version):
        found.append(f"{backend}: {plan.inputs.tensorrt_version}, then {published.tools[backend]}")
    if not found:
        steps = [name for name, digest in published.steps.items() if digest not in {step.digest for step in plan.steps}]
        found.append(f"this program makes other steps of the same spec: {', '.join(steps[:_MOST]) or 'none'}")
    return [*found[:_MOST], *([f"{len(found) - _MOST} more"] if len(found) > _MOST else [])]


def times_back(published: Manifest, plan: Plan) -> str:
    """Return the commands that restore old times of source files when only times differ; else empty."""
    then = {file.path: file for file in published.source}
    touched = []
    for file in plan.inputs.index.files + plan.inputs.extra_files:
        old = then.get(file.name)
        if old is None or old.num_bytes != file.num_bytes:
            return ""
        if old.identity == file.identity:
            continue
        kind, _, value = old.identity.partition(":")
        if kind != _TIME or not file.identity.startswith(f"{_TIME}:"):
            return ""
        touched.append(f"touch --date=@{int(value) // 10**9}.{int(value) % 10**9:09d} {file.name}")
    return "; ".join(touched[:_MOST])


def _of_file(now: SourceFile | None, then: SourceFileRecord | None) -> str | None:
    if now is None or then is None:
        return "gone" if now is None else "new"
    if now.num_bytes != then.num_bytes:
        return f"{now.num_bytes:,} bytes, then {then.num_bytes:,}"
    if now.identity == then.identity:
        return None
    kind, before = now.identity.partition(":")[0], then.identity.partition(":")[0]
    if kind != before:
        return f"known by {_KINDS.get(kind, kind)} now, by {_KINDS.get(before, before)} then"
    if kind in (_TIME, "time"):
        return "only its time of modification differs, its content may be the same"
    return "another version of the object" if kind == "etag" else "other content"


def _flat(plain: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in plain.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = list(value) if isinstance(value, tuple) else value
    return found


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:40] + "..."
