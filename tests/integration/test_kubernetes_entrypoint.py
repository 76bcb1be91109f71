"""What the pods of a rendered RayJob would do, done by real Ray nodes: its entry point, word for word, in a folder that holds what
the ConfigMap's volume holds.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest

from orchestrator.releases import read_release
from orchestrator.spec.cluster import PoolSpec
from orchestrator.submit.bundle import ENTRYPOINT, pack
from orchestrator.submit.kubernetes.manifests import Fields
from orchestrator.submit.kubernetes.overlays import load_overlay
from orchestrator.submit.kubernetes.render import overlay_cluster, render
from tests.conftest import SpecMaker
from tests.support.ray_nodes import RayNodes, skip_reason

pytestmark = pytest.mark.skipif(skip_reason() is not None, reason=str(skip_reason()))


def overlay_with_claim(*paths: str) -> list[Fields]:
    """The CPU overlay, every worker of which mounts a claim at these paths: source and store are folders here."""
    objects = load_overlay("cpu-aot")
    (job,) = [obj for obj in objects if obj["kind"] == "RayJob"]
    for group in job["spec"]["rayClusterSpec"]["workerGroupSpecs"]:
        pod = group["template"]["spec"]
        pod["volumes"].append({"name": "shared", "persistentVolumeClaim": {"claimName": "shared"}})
        pod["containers"][0]["volumeMounts"] += [{"name": "shared", "mountPath": path, "subPath": path[1:]} for path in paths]
    return objects


def lay_out(job: Fields, config: Fields, folder: Path) -> None:
    """As the kubelet fills the volume of the bundle."""
    pod = job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["template"]["spec"]
    (volume,) = [volume["configMap"] for volume in pod["volumes"] if "configMap" in volume]
    assert volume["name"] == config["metadata"]["name"]
    data = {key: text.encode() for key, text in config["data"].items()}
    data |= {key: base64.b64decode(text) for key, text in config.get("binaryData", {}).items()}
    for item in volume.get("items", [{"key": key, "path": key} for key in data]):
        path = folder / item["path"]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data[item["key"]])


def test_entrypoint_of_a_rendered_job_builds_and_publishes_on_a_ray_cluster(
    ray_nodes: RayNodes, make_spec: SpecMaker, tiny_llama: Path, tmp_path: Path
) -> None:
    mixture = tmp_path / "quant_cfg.json"
    mixture.write_text(json.dumps({"quantized_layers": {"transformer.layers.0.mlp.fc": {"quant_algo": "W8A16"}}}))
    packed = pack(
        make_spec(
            tiny_llama,
            verification={"enabled": False},
            quantization={"algorithm": "MIXED_PRECISION", "quant_cfg": str(mixture)},
            release={"name": "rayjob", "version": "1"},
        )
    )
    store = ray_nodes.store_url.removeprefix("file://")
    objects = overlay_with_claim(str(tiny_llama), store)
    place = overlay_cluster(objects).model_copy(
        update={"store": ray_nodes.store_url, "scratch": None, "pools": {"all": PoolSpec()}}
    )
    made = render(packed.spec, place, objects, files={path: file.read_bytes() for path, file in packed.files.items()})
    (config,) = [obj for obj in made.owned if obj["kind"] == "ConfigMap"]
    lay_out(made.job, config, tmp_path / "bundle")

    entrypoint = made.job["spec"]["entrypoint"]
    assert entrypoint == ENTRYPOINT
    done = ray_nodes.run(2, "bash", "-c", f"cd {tmp_path / 'bundle'} && {entrypoint}")
    assert done.returncode == 0, done.stderr
    last = json.loads(done.stdout.splitlines()[-1])
    annotations = made.job["metadata"]["annotations"]
    assert last["manifest"] == f"{annotations['trt-orchestrator/release']}/manifest.json"
    _, manifest = read_release(annotations["trt-orchestrator/release"])
    assert manifest.quantization is not None  # the file that the spec names has travelled
