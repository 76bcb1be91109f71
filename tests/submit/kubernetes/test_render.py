"""A build spec and an overlay become manifests; what cannot run there is refused before anything is printed."""

from __future__ import annotations

import base64
import copy
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from orchestrator.base.errors import ClusterError, ManifestError, OrchestratorError, SpecError
from orchestrator.cli.commands import app
from orchestrator.spec.build import BuildSpec
from orchestrator.spec.cluster import ClusterSpec
from orchestrator.spec.loading import load_cluster, load_spec
from orchestrator.submit.bundle import ENTRYPOINT, submission_id
from orchestrator.submit.kubernetes.fitting import quantity
from orchestrator.submit.kubernetes.manifests import Fields
from orchestrator.submit.kubernetes.overlays import OWN, load_overlay, overlay_names
from orchestrator.submit.kubernetes.render import Rendered, overlay_cluster, refuse_placeholder_images, render

STORE = "s3://mine/builds"
SPEC = {"source": {"path": "s3://mine/models/llama"}, "topology": {"tp": 2}, "release": {"name": "llama-3.1", "version": "1"}}


@pytest.fixture(scope="module")
def overlay() -> list[Fields]:
    return load_overlay("cpu-aot")


@pytest.fixture
def place(overlay: list[Fields]) -> ClusterSpec:
    return overlay_cluster(overlay).model_copy(update={"store": STORE})


def spec_of(**sections: Any) -> BuildSpec:
    return BuildSpec.model_validate({**SPEC, **sections})


@pytest.fixture
def rendered(overlay: list[Fields], place: ClusterSpec) -> Rendered:
    return render(spec_of(), place, overlay)


def with_job(overlay: list[Fields], change: Any) -> list[Fields]:
    """The overlay with its RayJob changed."""
    made = copy.deepcopy(overlay)
    change(next(obj for obj in made if obj["kind"] == "RayJob"))
    return made


def test_render_job_runs_the_command_of_every_submission(rendered: Rendered) -> None:
    assert rendered.job["spec"]["entrypoint"] == ENTRYPOINT


def test_render_config_map_decodes_to_the_build(rendered: Rendered, place: ClusterSpec, tmp_path: Path) -> None:
    config = next(obj for obj in rendered.owned if obj["kind"] == "ConfigMap")
    for name, text in config["data"].items():
        (tmp_path / name).write_text(text)
    assert load_spec(tmp_path / "spec.yaml") == spec_of()
    assert load_cluster(tmp_path / "cluster.yaml") == place


def test_render_name_is_the_submission_id_and_short_enough(overlay: list[Fields], place: ClusterSpec) -> None:
    spec = spec_of(release={"name": "m" * 100, "version": "1"})
    made = render(spec, place, overlay)
    assert made.name == submission_id(spec, place)
    assert len(made.name) <= 47


def test_render_everything_of_the_build_bears_its_name(rendered: Rendered) -> None:
    names = {obj["metadata"]["name"] for obj in rendered.owned}
    assert names == {rendered.name, f"{rendered.name}-head", f"{rendered.name}-driver"}
    text = rendered.to_yaml()
    assert f"app.kubernetes.io/instance: {rendered.name}" in text
    assert "app.kubernetes.io/instance: build\n" not in text
    volumes = [
        volume["configMap"]["name"]
        for group in [
            rendered.job["spec"]["rayClusterSpec"]["headGroupSpec"],
            *rendered.job["spec"]["rayClusterSpec"]["workerGroupSpecs"],
        ]
        for volume in group["template"]["spec"]["volumes"]
        if "configMap" in volume
    ]
    assert volumes == [rendered.name] * 3


def test_render_shared_objects_are_the_same_for_every_build(overlay: list[Fields], place: ClusterSpec, rendered: Rendered) -> None:
    other = render(spec_of(dtype="float16"), place, overlay)
    assert other.name != rendered.name
    assert other.shared == rendered.shared
    assert {obj["kind"] for obj in rendered.shared} == {"ServiceAccount", "NetworkPolicy"}


def test_render_leaves_the_overlay_as_it_was(overlay: list[Fields], place: ClusterSpec) -> None:
    before = copy.deepcopy(overlay)
    render(spec_of(), place, overlay, namespace="mine", images={"": "registry.test/image:1"})
    assert overlay == before


def test_render_namespace_and_images_replace_those_of_the_overlay(overlay: list[Fields], place: ClusterSpec) -> None:
    made = render(
        spec_of(), place, overlay, namespace="mine", images={"trt-orchestrator-cpu": "registry.test/cpu@sha256:" + "0" * 64}
    )
    assert {obj["metadata"]["namespace"] for obj in made.objects} == {"mine"}
    assert "registry.example.com" not in made.to_yaml()
    refuse_placeholder_images(made)


def test_render_unknown_image_names_those_that_run(overlay: list[Fields], place: ClusterSpec) -> None:
    with pytest.raises(SpecError, match="no container runs an image named gpu") as error:
        render(spec_of(), place, overlay, images={"gpu": "x"})
    assert "trt-orchestrator-cpu" in error.value.advice


def test_images_of_the_examples_are_not_submitted(rendered: Rendered) -> None:
    with pytest.raises(SpecError, match=r"placeholder registry\.example\.com"):
        refuse_placeholder_images(rendered)


def test_render_store_of_the_examples_is_refused(overlay: list[Fields]) -> None:
    with pytest.raises(SpecError, match="placeholder s3://BUCKET"):
        render(spec_of(), overlay_cluster(overlay), overlay)


@pytest.mark.parametrize(
    ("sections", "changes", "message"),
    [
        ({"source": {"path": "/models/llama"}}, {}, "source.path is /models/llama, and group"),
        ({}, {"store": "file:///builds"}, "store is /builds, and group"),
        ({"quantization": {"algorithm": "MIXED_PRECISION", "quant_cfg": "/q.json"}}, {}, "quantization.quant_cfg is /q.json"),
        ({"quantization": {"algorithm": "FP8", "calibration": {"dataset": "/texts.jsonl"}}}, {}, "dataset is /texts.jsonl"),
        ({"engine": {"backend": "tensorrt"}}, {}, "build steps need a GPU"),
        ({"quantization": {"algorithm": "FP8", "calibration": {"device": "cuda"}}}, {}, "calibrate steps need a GPU"),
        ({"verification": {"device": "cuda"}}, {}, "reference steps need a GPU"),
        ({}, {"pools": {"a": {"steps": ["convert", "build"]}}}, "no pool of the cluster file runs reference steps"),
        ({}, {"pools": {"a": {"labels": {"pool": "cpu"}, "memory": "1TB"}}}, "pool a promises 1,000,000,000,000 memory"),
        ({}, {"pools": {"a": {"labels": {"pool": "cpu"}, "gpus": 1}}}, "pool a promises 1 gpus, and its largest pod has 0"),
    ],
)  # fmt: skip
def test_render_build_that_the_pods_cannot_run_is_refused(
    overlay: list[Fields], place: ClusterSpec, sections: Fields, changes: Fields, message: str
) -> None:
    there = ClusterSpec.model_validate({**place.model_dump(exclude_unset=True), **changes})
    with pytest.raises(ClusterError) as error:
        render(spec_of(**sections), there, overlay)
    assert message in error.value.message
    assert error.value.advice


def test_render_says_everything_that_does_not_fit_at_once(overlay: list[Fields], place: ClusterSpec) -> None:
    with pytest.raises(ClusterError, match=r"source.path is /a.*build steps need a GPU"):
        render(spec_of(source={"path": "/a"}, engine={"backend": "tensorrt"}), place, overlay)


def test_render_local_source_below_a_claim_of_every_group_is_taken(overlay: list[Fields], place: ClusterSpec) -> None:
    def mount(job: Fields) -> None:
        for group in job["spec"]["rayClusterSpec"]["workerGroupSpecs"]:
            pod = group["template"]["spec"]
            pod["volumes"].append({"name": "models", "persistentVolumeClaim": {"claimName": "models"}})
            pod["containers"][0]["volumeMounts"].append({"name": "models", "mountPath": "/models"})

    assert render(spec_of(source={"path": "/models/llama"}), place, with_job(overlay, mount)).job
    with pytest.raises(ClusterError, match=r"source\.path is /modelsX"):
        render(spec_of(source={"path": "/modelsX"}), place, with_job(overlay, mount))


@pytest.mark.parametrize("name", [name for name in overlay_names() if name != "interactive"])
def test_render_every_overlay_of_jobs_gives_the_build_its_name(name: str) -> None:
    objects = load_overlay(name)
    made = render(spec_of(), overlay_cluster(objects).model_copy(update={"store": STORE}), objects, namespace="mine")
    assert {obj["metadata"]["name"].removesuffix("-head").removesuffix("-driver") for obj in made.owned} == {made.name}
    assert "namespace: trt-builds" not in made.to_yaml()


def test_render_overlay_of_a_cluster_that_stays_is_refused() -> None:
    with pytest.raises(ManifestError, match="holds 0 RayJobs") as error:
        render(spec_of(), ClusterSpec(kind="ray", store=STORE), load_overlay("interactive"))
    assert "orchestrator submit" in error.value.advice


@pytest.mark.parametrize("name", ["h100", "l40s-mixed", "kueue"])
def test_render_gpu_build_with_an_overlay_of_gpus_is_taken(name: str) -> None:
    objects = load_overlay(name)
    made = render(spec_of(engine={"backend": "tensorrt"}), overlay_cluster(objects).model_copy(update={"store": STORE}), objects)
    assert "nvidia.com/gpu" in made.to_yaml()


@pytest.mark.parametrize(
    "changes", [{"kind": "local"}, {"address": "ray://head:10001"}, {"pools": {"a": {"labels": {"pool": "h100"}}}}]
)
def test_render_cluster_file_that_breaks_a_rule_of_the_bundle_is_refused(
    overlay: list[Fields], place: ClusterSpec, changes: Fields
) -> None:
    there = ClusterSpec.model_validate({**place.model_dump(exclude_unset=True), **changes})
    with pytest.raises(ManifestError, match=r"BU0[23]"):
        render(spec_of(), there, overlay)


def test_render_source_on_a_volume_that_is_empty_in_every_pod_is_refused(overlay: list[Fields], place: ClusterSpec) -> None:
    with pytest.raises(ClusterError, match="outlives"):
        render(spec_of(source={"path": "/tmp/llama"}), place, overlay)


def test_render_spec_too_large_for_a_config_map_is_refused(overlay: list[Fields], place: ClusterSpec) -> None:
    with pytest.raises(SpecError, match="a ConfigMap holds 1,048,576"):
        render(spec_of(verification={"prompts": ["x" * 2**20]}), place, overlay)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda job: job["spec"].update(entrypoint="python -m mine"), "does not run"),
        (lambda job: job["metadata"].update(name="other"), "not named build"),
        (lambda job: job.update(kind="RayCluster"), "holds 0 RayJobs"),
    ],
)
def test_render_overlay_that_is_no_build_is_refused(overlay: list[Fields], place: ClusterSpec, change: Any, message: str) -> None:
    with pytest.raises(ManifestError, match=message):
        render(spec_of(), place, with_job(overlay, change))


def test_render_result_that_breaks_a_rule_is_refused(overlay: list[Fields], place: ClusterSpec) -> None:
    with pytest.raises(ManifestError, match="broken rules"):
        render(spec_of(), place, with_job(overlay, lambda job: job["spec"].update(submissionMode="InteractiveMode")))
    with pytest.raises(ManifestError, match="RN01"):
        render(spec_of(), place, overlay, name="Not-A-Name")


@pytest.mark.parametrize(("text", "number"), [("8Gi", 8 * 2**30), ("500m", 0.5), (2, 2), ("1.5", 1.5), ("3G", 3e9), (None, 0)])
def test_quantity_is_read_as_kubernetes_reads_it(text: Any, number: float) -> None:
    assert quantity(text) == number


def test_quantity_that_is_none_is_an_error() -> None:
    with pytest.raises(ClusterError, match="not a quantity"):
        quantity("much")


def test_render_files_that_the_spec_names_travel_in_the_config_map(overlay: list[Fields], place: ClusterSpec) -> None:
    files = {"files/0123/scales/rank0.json": b"{}", "files/0123/scales/blob.bin": bytes(range(256))}
    spec = spec_of(quantization={"algorithm": "FP8", "scales": "files/0123/scales"})
    made = render(spec, place, overlay, files=files)
    config = next(obj for obj in made.owned if obj["kind"] == "ConfigMap")
    (volume, *_) = [
        volume["configMap"]
        for volume in made.job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["template"]["spec"]["volumes"]
        if "configMap" in volume
    ]
    found = {
        item["path"]: base64.b64decode(config["binaryData"][item["key"]])
        for item in volume["items"]
        if item["key"] in config["binaryData"]
    }
    assert found == files
    assert {item["path"] for item in volume["items"]} == {*files, "spec.yaml", "cluster.yaml", "build.sh"}


def test_load_overlay_unknown_name_lists_the_known() -> None:
    with pytest.raises(ManifestError, match="no overlay h9000") as error:
        load_overlay("h9000")
    assert "cpu-aot" in error.value.advice


def test_overlays_of_the_package_are_those_of_the_repository_and_travel_in_the_wheel() -> None:
    root = Path(__file__).resolve().parents[3]
    assert OWN.resolve() == root / "deploy/kuberay"
    assert "cpu-aot" in overlay_names()
    patterns = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["orchestrator"]
    assert "submit/kubernetes/kuberay/**/*" in patterns


@pytest.fixture
def spec_file(tmp_path: Path) -> Path:
    path = tmp_path / "spec.yaml"
    path.write_text(yaml.safe_dump(SPEC))
    return path


def run(*arguments: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["k8s", *arguments])
    assert done.exception is None or isinstance(done.exception, SystemExit)
    return done.exit_code, done.output


def test_render_on_the_command_line_prints_manifests(spec_file: Path) -> None:
    code, text = run("render", str(spec_file), "--overlay", "cpu-aot", "--store", STORE, "--image", "registry.test/x:1")
    assert code == 0
    kinds = [obj["kind"] for obj in yaml.safe_load_all(text)]
    assert kinds[-1] == "RayJob"
    assert "registry.test/x:1" in text


def test_render_on_the_command_line_into_a_folder_writes_one_file_per_object(spec_file: Path, tmp_path: Path) -> None:
    code, _ = run("render", str(spec_file), "--overlay", "cpu-aot", "--store", STORE, "--name", "mine", "-o", str(tmp_path / "out"))
    assert code == 0
    assert {"rayjob-mine.yaml", "configmap-mine.yaml"} <= {path.name for path in (tmp_path / "out").iterdir()}


def test_render_on_the_command_line_without_a_store_ends_with_its_exit_code(spec_file: Path) -> None:
    code, text = run("render", str(spec_file), "--overlay", "cpu-aot")
    assert code == SpecError.exit_code
    assert "--store" in text
    assert issubclass(SpecError, OrchestratorError)
