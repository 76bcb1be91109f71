"""The container files: that they install what the project names, and run as the pods expect. Building them needs a registry."""

from __future__ import annotations

import io
import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
from dockerfile_parse import DockerfileParser
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from orchestrator.base.programs import find_program
from tests.submit.kubernetes.overlays import cluster_spec, overlay

HADOLINT = find_program("hadolint") or "hadolint"
ROOT = Path(__file__).resolve().parents[1]
IMAGES = ROOT / "deploy" / "images"
_EVERY = {"build", "ray", "obstore", "signing"}
EXTRAS = {"cpu": _EVERY, "gpu": _EVERY | {"tensorrt"}}
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
by_role = pytest.mark.parametrize("role", sorted(EXTRAS))


def path(role: str) -> Path:
    return IMAGES / f"{role}.Containerfile"


def instructions(role: str) -> list[tuple[str, str]]:
    """Instruction and value, in order, comments left out, lines joined."""
    parser = DockerfileParser(fileobj=io.BytesIO(path(role).read_bytes()))
    return [(item["instruction"], " ".join(item["value"].split())) for item in parser.structure if item["instruction"] != "COMMENT"]


def values(role: str, instruction: str) -> list[str]:
    return [value for name, value in instructions(role) if name == instruction]


def final_stage(role: str) -> list[tuple[str, str]]:
    found = instructions(role)
    return found[max(number for number, (name, _) in enumerate(found) if name == "FROM") :]


def constraints() -> dict[str, str]:
    lines = (line for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line and not line.startswith("#"))
    return {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in lines)}


def test_images_there_is_one_of_every_role() -> None:
    assert sorted(file.stem for file in IMAGES.glob("*.Containerfile")) == sorted(EXTRAS)


@by_role
def test_image_hadolint_finds_nothing(role: str) -> None:
    done = subprocess.run([HADOLINT, "--no-color", str(path(role))], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_hadolint_finds_what_is_wrong() -> None:
    done = subprocess.run([HADOLINT, "-"], input="FROM debian\nADD http://x/y /y\n", capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "DL3006" in done.stdout


@by_role
def test_image_base_is_pinned_by_version_and_a_digest_that_must_be_given(role: str) -> None:
    found = instructions(role)
    assert found[:3] == [("ARG", found[0][1]), ("ARG", "BASE_DIGEST"), ("FROM", "${BASE}@${BASE_DIGEST} AS base")]
    version = re.fullmatch(r"BASE=docker\.io/library/python:(\d+\.\d+\.\d+)-slim-\w+", found[0][1])
    assert version is not None
    assert version.group(1) in SpecifierSet(PROJECT["requires-python"])
    stages = [value.partition(" AS ")[::2] for value in values(role, "FROM")]
    assert stages == [("${BASE}@${BASE_DIGEST}", "base"), ("base", "environment"), ("environment", "sbom"), ("base", "")]


@by_role
def test_image_installs_torch_first_and_then_the_project_under_its_constraints(role: str) -> None:
    installs = [line for value in values(role, "RUN") for line in value.split("&&") if "pip install" in line]
    torch, project, sbom = installs
    assert torch.split()[-1] == "torch"
    extras = re.search(r"'\.\[([a-z,]+)\]'", project)
    assert extras is not None
    assert set(extras.group(1).split(",")) == EXTRAS[role]
    assert all("-c constraints.txt" in line for line in (torch, project))
    assert 'cyclonedx-bom==${CYCLONEDX_VERSION}"' in sbom
    assert re.fullmatch(r"CYCLONEDX_VERSION=[\d.]+", values(role, "ARG")[-1])
    assert f"torch.version.cuda is {'None' if role == 'cpu' else 'not None'}" in " ".join(values(role, "RUN"))


@by_role
def test_image_everything_it_installs_is_pinned_by_the_constraints(role: str) -> None:
    pins = constraints()
    wanted = [*PROJECT["dependencies"], *(text for extra in EXTRAS[role] for text in PROJECT["optional-dependencies"][extra])]
    for text in wanted:
        requirement = Requirement(text)
        version = pins.get(canonicalize_name(requirement.name))
        assert version is not None, f"{requirement.name} is not in constraints.txt"
        assert version in requirement.specifier, text


@by_role
def test_image_copies_only_files_of_the_repository_that_the_ignore_file_lets_through(role: str) -> None:
    assert values(role, "ADD") == []
    sources = [source for value in values(role, "COPY") if "--from" not in value for source in value.split()[:-1]]
    allowed = {
        line.removeprefix("!").removesuffix("/**") for line in (ROOT / ".dockerignore").read_text().splitlines() if "!" in line
    }
    assert "*" in (ROOT / ".dockerignore").read_text().splitlines()
    assert all((ROOT / source).exists() for source in sources)
    assert set(sources) == allowed


@by_role
def test_image_holds_no_secret_and_fetches_nothing_by_address(role: str) -> None:
    text = path(role).read_text()
    names = re.findall(r"^(?:ARG|ENV) +(\w+)", text, re.MULTILINE)
    assert not [name for name in names if re.search("TOKEN|SECRET|PASSWORD|KEY", name)]
    commands = " ".join(values(role, "RUN"))
    assert not re.search(r"https?://|\b(curl|wget|git clone)\b", commands)


@by_role
def test_image_states_what_is_inside(role: str) -> None:
    commands = " ".join(values(role, "RUN"))
    assert "cyclonedx-py environment" in commands
    assert "/opt/orchestrator/bin/python" in commands
    assert ("COPY", "--from=sbom /sbom /usr/share/sbom") in final_stage(role)


@by_role
def test_image_is_what_the_pods_expect(role: str) -> None:
    stage = final_stage(role)
    spec = cluster_spec(overlay("l40s-mixed"))
    pods = [group["template"]["spec"] for group in [spec["headGroupSpec"], *spec["workerGroupSpecs"]]]
    fitting = [pod for pod in pods if pod["containers"][0]["image"].endswith(f"/trt-orchestrator-{role}:{PROJECT['version']}")]
    assert fitting
    for pod in fitting:
        (ray,) = pod["containers"]
        context = pod["securityContext"]
        assert ("USER", f"{context['runAsUser']}:{context['runAsGroup']}") in stage
        assert ("WORKDIR", ray["workingDir"]) in stage
        home = next(entry["value"] for entry in ray["env"] if entry["name"] == "HOME")
        assert any(name == "ENV" and f"HOME={home}" in value.split() for name, value in stage)
    assert spec["rayVersion"] == constraints()["ray"]
    assert not {"ENTRYPOINT", "HEALTHCHECK"} & {name for name, _ in stage}


def test_gpu_image_shows_no_gpu_to_a_pod_that_asks_for_none() -> None:
    (environment,) = [value for name, value in final_stage("gpu") if name == "ENV"]
    assert "NVIDIA_VISIBLE_DEVICES=void" in environment.split()
