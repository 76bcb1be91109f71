"""The bundle of a submitted build: its files, and the command that runs them on the cluster.

Every kind of submission (Ray's job API, a RayJob of Kubernetes) sends these files and runs ENTRYPOINT in their folder. Spec and
cluster file are decoded before, so that a mistake is an error before anything is sent.
"""

from __future__ import annotations

import hashlib
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.base.digest import digest_file, digest_of
from orchestrator.base.errors import SourceMissingError, SpecError, ToolError
from orchestrator.base.urls import is_url
from orchestrator.events import Errored, encode_line
from orchestrator.spec.build import DATA_SUFFIXES, BuildSpec
from orchestrator.spec.cluster import ClusterSpec
from orchestrator.spec.yaml_text import dump_yaml

SPEC_FILE, CLUSTER_FILE, SCRIPT_FILE = "spec.yaml", "cluster.yaml", "build.sh"
ENTRYPOINT = f"exec sh {SCRIPT_FILE}"
"""Command of the driver. Prints events as JSON lines and exits with the build's own code.

`exec`: Ray runs the command through a shell, and on stop ends the shell first. The driver would then be left to the container's
first process. Unless that reaps orphans, Ray would see the ended driver as one that does not end.
"""
_SCRIPT = """\
# The driver of a build, under a Python that has this program: the one that is named here, else that of Ray, else of the PATH.
ray_python() {  # the raylet above names it on its command line
    process=$PPID
    while [ "${process:-0}" -gt 1 ]; do
        found=$(tr '\\0' '\\n' 2> /dev/null < "/proc/$process/cmdline" | sed -n 's/^--python_worker_command=\\([^ ]*\\) .*/\\1/p')
        if [ -n "$found" ]; then
            printf '%s' "$found"
            return
        fi
        process=$(sed 's/.*) [^ ]* \\([0-9]*\\) .*/\\1/' "/proc/$process/stat" 2> /dev/null)
    done
}
named=@NAMED@
if [ -n "$named" ]; then set -- "$named"; else set -- "$(ray_python)" python python3; fi
for python; do
    if [ -n "$python" ] && "$python" -c 'import orchestrator.spec.build' 2> /dev/null; then
        exec "$python" -m orchestrator.cli build @SPEC@ --cluster @CLUSTER@ --json
    fi
done
echo '@ERROR@'
exit @CODE@
"""


def bundle(spec: BuildSpec, cluster_spec: ClusterSpec) -> dict[str, str]:
    """Return the bundle's files by name: YAML that decodes to the same values, with paths made absolute by the loader."""
    return {
        SPEC_FILE: dump_yaml(spec.model_dump(mode="json", exclude_unset=True)),
        CLUSTER_FILE: dump_yaml(cluster_spec.model_dump(mode="json", exclude_unset=True)),
        SCRIPT_FILE: script(cluster_spec.driver.python),
    }


def script(python: str | None) -> str:
    """Return the shell script that ENTRYPOINT runs."""
    tried = f"{python}, which the cluster file names" if python else "that of Ray, python and python3 were tried"
    error = ToolError(
        f"the driver's node has no Python that can import trt-orchestrator: {tried}",
        "Install it into the environment that runs Ray, or name another Python in the cluster file (driver.python).",
    )
    words = {
        "NAMED": shlex.quote(python or ""),
        "SPEC": SPEC_FILE,
        "CLUSTER": CLUSTER_FILE,
        "ERROR": encode_line(Errored.of(error)).replace("'", "\\u0027"),
        "CODE": str(error.exit_code),
    }
    return re.sub("@([A-Z]+)@", lambda match: words[match[1]], _SCRIPT)


def submission_id(spec: BuildSpec, cluster_spec: ClusterSpec) -> str:
    """Return the id of a build at a store. It is the same each time, so that a second submission finds the first.

    The id is a DNS label, short enough for a RayJob of Kubernetes (47 characters).
    """
    wanted = {"spec": spec.model_dump(mode="json"), "store": cluster_spec.store}
    name = "".join(character if character.isalnum() else "-" for character in spec.release.name.lower()).strip("-")
    return f"build-{name[:28].rstrip('-')}-{digest_of(wanted)[:12]}"


_FILES = "files"
_MAX_FILE_BYTES = 100 * 10**6
"""Largest size of all files together: they pass through the cluster's head to every node."""
_DIGITS = 12


@dataclass(frozen=True)
class Packed:
    """A spec with its local files."""

    spec: BuildSpec
    """Spec that names the files by their paths in the bundle. The paths begin with digests, so other content is another build."""
    files: dict[str, Path]
    """Local files, by path in the bundle."""


def pack(spec: BuildSpec) -> Packed:
    """Pack quant_cfg, scales and calibration data of this machine into the bundle.

    A missing absolute path is taken to exist on every node. Raises SourceMissingError for a missing relative path, SpecError for
    files that are too large.
    """
    wanted = spec.quantization
    if wanted is None:
        return Packed(spec, {})
    files: dict[str, Path] = {}
    update: dict[str, Any] = {
        name: _pack(place, files) for name in ("quant_cfg", "scales") if (place := getattr(wanted, name)) is not None
    }
    calibration = wanted.calibration
    if Path(calibration.dataset).suffix in DATA_SUFFIXES:
        dataset = _pack(calibration.dataset, files)
        update["calibration"] = calibration.model_copy(update={"dataset": dataset})
    size = sum(path.stat().st_size for path in files.values())
    if size > _MAX_FILE_BYTES:
        raise SpecError(
            f"the files that the spec names have {size:,} bytes, a submission holds {_MAX_FILE_BYTES:,}",
            "Put them on every node or into a shared folder, and name them by that absolute path.",
        )
    return Packed(spec.model_copy(update={"quantization": wanted.model_copy(update=update)}), files)


def _pack(place: str, files: dict[str, Path]) -> str:
    path = Path(place).expanduser()
    found = {path.name: path} if path.is_file() else _files_below(path)
    if not found:
        if path.is_absolute():
            return place
        raise SourceMissingError(f"there is no {place}, which the spec names", "A relative path counts from this folder.")
    hasher = hashlib.sha256()
    for name, file in found.items():
        hasher.update(f"{name}\0{digest_file(file)}\n".encode())
    folder = f"{_FILES}/{hasher.hexdigest()[:_DIGITS]}"
    files |= {f"{folder}/{name}": file for name, file in found.items()}
    return f"{folder}/{path.name}"


def _files_below(folder: Path) -> dict[str, Path]:
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    return {f"{folder.name}/{path.relative_to(folder).as_posix()}": path for path in found}


def expected_on_nodes(spec: BuildSpec, cluster_spec: ClusterSpec) -> tuple[str, ...]:
    """Return sentences about what does not travel and must exist there, for submissions from another machine."""
    found = []
    if cluster_spec.store.startswith("file:"):
        found.append(f"the store {cluster_spec.store} must be one folder that all nodes share")
    if not is_url(spec.source.path):
        found.append(f"every node must have the source {spec.source.path} under this path")
    found += [f"every node must have {path}" for path in named_files(spec).values() if Path(path).is_absolute()]
    return tuple(found)


def named_files(spec: BuildSpec) -> dict[str, str]:
    """Return the files that the spec names beside its source, by field."""
    wanted = spec.quantization
    tokenizer = {"source.tokenizer": spec.source.tokenizer} if spec.source.tokenizer else {}
    if wanted is None:
        return tokenizer
    named = {"quant_cfg": wanted.quant_cfg, "scales": wanted.scales, "calibration.dataset": wanted.calibration.dataset}
    if Path(wanted.calibration.dataset).suffix not in DATA_SUFFIXES:  # a data set of the hub
        del named["calibration.dataset"]
    return tokenizer | {f"quantization.{field}": path for field, path in named.items() if path is not None}
