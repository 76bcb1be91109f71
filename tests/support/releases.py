"""Releases of fake engines: a real plan of a tiny source, outcomes that nobody ran, published by the real code."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from orchestrator import building
from orchestrator.base.digest import ChunkHasher, chunk_digests, digest_bytes
from orchestrator.engines import Profile
from orchestrator.engines.profiles import rank_profiles
from orchestrator.networks import Rendering, decoder_network
from orchestrator.planning import preparation
from orchestrator.planning.options import BuildOptions, VerifyOptions
from orchestrator.planning.plan import Plan
from orchestrator.planning.steps import Consumed, Kind, Outcome, Output, Step
from orchestrator.releases import signing
from orchestrator.releases.manifest import MANIFEST, Chunks, FileRecord, Manifest, signature_key
from orchestrator.releases.publish import signed_digests
from orchestrator.releases.reference_numbers import REFERENCE
from orchestrator.scheduling import commits
from orchestrator.spec.build import BuildSpec
from orchestrator.spec.cluster import ClusterSpec, PoolSpec
from orchestrator.spec.decoding import decode
from orchestrator.stores import open_store
from orchestrator.stores.store import Store
from tests.support.synthetic import model_config, random_arrays, write_source

SMALL_CHUNK = 1000
FOR_TRITON = {"backend": "tensorrt", "for_triton": True, "max_batch_size": 2, "max_input_len": 16, "max_seq_len": 64}


def tiny_source(folder: Path) -> Path:
    """A seeded Llama-shaped source with a tokenizer file."""
    config = model_config()
    source = write_source(folder, config, random_arrays(config))
    (source / "tokenizer.json").write_text('{"version": "1.0"}')
    return source


def release_spec(source: Path, **sections: Any) -> BuildSpec:
    plain = {
        "source": {"path": str(source)},
        "topology": {"tp": 2, "pp": 2},
        "engine": {"max_batch_size": 2, "max_input_len": 16, "max_seq_len": 64},
        "verification": {"enabled": False},
        "release": {"name": "tiny", "version": "1"},
        **sections,
    }
    return decode(BuildSpec, plain, "test")


def pretend_to_run(plan: Plan, store: Store) -> dict[str, Outcome]:
    """Commit an outcome for every step, with outputs of seeded bytes; an engine has several small chunks."""
    outcomes = {}
    for step in plan.steps:
        name, data = "out", (step.digest * 60).encode()[:3500]
        if step.kind is Kind.BUILD:
            name = f"rank{BuildOptions.model_validate(step.options).rank}.engine"
        elif step.kind is Kind.REFERENCE:
            name, data = REFERENCE, tiny_reference()
        key = commits.attempt_prefix(step.digest, "attempt") + name
        store.put(key, data)
        output = Output(name=name, key=key, num_bytes=len(data), sha256=digest_bytes(data), chunks=chunk_digests(data))
        outcomes[step.digest] = commits.commit(
            store,
            Outcome(
                digest=step.digest,
                name=step.name,
                kind=step.kind,
                outputs=(output,),
                consumed=tuple(
                    Consumed(step=need, name=made.name, sha256=made.sha256)
                    for need in step.needs
                    for made in outcomes[need].outputs[:1]
                ),
                facts=engine_facts(step),
                tools={"tensorrt_rtx": "1.7.1.116"},
                log_tail="a log may hold anything",
            ),
        )
    return outcomes


def tiny_reference() -> bytes:
    """What a reference step writes, of seeded logits: two texts of 5 and 3 tokens, a vocabulary of 50."""
    generator = np.random.default_rng(4)
    tokens = generator.integers(0, 50, (2, 5))
    tokens[1, 3:] = 0
    logits = generator.standard_normal((2, 5, 50)).astype(np.float32)
    return save({"tokens": tokens, "lengths": np.array([5, 3]), "logits": logits})


MINIATURE = {
    "num_layers": 2,
    "tolerance": 5e-5,
    "cases": [{"ranks": "one rank", "num_prompts": 8, "num_positions": 100, "max_relative_error": 2e-6}],
    "thresholds": [{"key": "max_position_embeddings", "value": 2048, "tokens": 32, "crossed": True}],
}


def engine_facts(step: Step) -> dict[str, Any]:
    """What a step records of an engine that TensorRT did not make, or of its verification."""
    if step.kind is Kind.VERIFY:
        network = VerifyOptions.model_validate(step.options).network
        return {"networks": [network.digest(tp_rank) for tp_rank in range(network.stage.tp)]}
    if step.kind is Kind.MINIATURE:
        return {"miniature": MINIATURE}
    if step.kind is not Kind.BUILD:
        return {}
    options = BuildOptions.model_validate(step.options)
    profiles = rank_profiles(options.network, options.engine)
    engine = {
        "backend": options.engine.backend, "tensorrt_version": "1.7.1.116", "cuda_version": "13",
        "compute_capabilities": ["8.9"], "profiles": [profile.name for profile in profiles], "tensors": _tensors(options, profiles),
    }  # fmt: skip
    return {"engine": engine, "options": step.options, "network": options.network.digest(options.tp_rank)}


def _tensors(options: BuildOptions, profiles: tuple[Profile, ...]) -> list[dict[str, Any]]:
    """Inputs and outputs of the real graph, as the backend records them."""
    graph = decoder_network(options.network, options.tp_rank, Rendering.compiled(options.network)).model.graph
    dtypes = {1: "float", 3: "int8", 7: "int64", 10: "half", 16: "bf16", 17: "fp8"}
    found = []
    for mode, values in (("input", graph.input), ("output", graph.output)):
        for value in values:
            tensor = value.type.tensor_type
            dtype = dtypes[tensor.elem_type]
            in_place = value.name.startswith("present_") and dtype not in ("int8", "fp8") and not options.engine.for_triton
            ranges = {
                profile.name: dict(zip(("min", "opt", "max"), profile.shapes[value.name], strict=True))
                for profile in profiles
                if value.name in profile.shapes
            }
            found.append(
                {
                    "name": value.name, "dtype": dtype, "mode": mode, "profiles": ranges,
                    "shape": [dim.dim_param or dim.dim_value for dim in tensor.shape.dim],
                    "aliases": value.name.replace("present_", "past_") if in_place else None,
                }
            )  # fmt: skip
    return found


def publish_tiny(folder: Path, sign_key: Path | None = None, url: str | None = None, **sections: Any) -> Published:
    """Four ranks, built from nothing, in the store at `url`, or `folder`/store."""
    source = folder / "source"
    if not source.exists():
        tiny_source(source)
    store = open_store(url or (folder / "store").as_uri())
    spec = release_spec(source, **sections)
    pretend_to_run(preparation.plan(spec), store)
    cluster_spec = ClusterSpec(store=store.url, pools={"all": PoolSpec(gpus=1)})
    done = building.build(spec, cluster_spec, sign_key=sign_key)
    return Published(done.address, done.manifest, store, Path(done.address.removeprefix("file://")), done.plan)


@dataclass(frozen=True)
class Published:
    url: str
    manifest: Manifest
    store: Store
    folder: Path
    plan: Plan

    def path(self, rank: int) -> Path:
        """Of an engine in the store."""
        return self.folder / self.manifest.ranks[rank].files[0].key


def copy_release(published: Published, name: str, version: str, sign_key: Path | None = None) -> Published:
    """The same files published under another name or version, unsigned or signed."""
    folder = Path(shutil.copytree(published.folder, published.folder.parents[1] / name / version))
    shutil.rmtree(folder / "signatures", ignore_errors=True)
    manifest = published.manifest.model_copy(update={"name": name, "version": version})
    data = manifest.to_json()
    (folder / MANIFEST).write_bytes(data)
    if sign_key is not None:
        digests = signed_digests(manifest, data)
        place = folder / signature_key(digests[MANIFEST])
        place.parent.mkdir()
        place.write_bytes(signing.sign(digests, name, sign_key))
    return Published(folder.as_uri(), manifest, published.store, folder, published.plan)


def reseal(published: Published, **changed: Any) -> Manifest:
    """Rewrite the manifest with other fields and a digest that fits them, as anyone may who can write to the store."""
    manifest = published.manifest.model_copy(update=changed)
    (published.folder / MANIFEST).write_bytes(manifest.to_json())
    return manifest


def cut_small(published: Published) -> None:
    """Rewrite the manifest so that engines have several chunks of SMALL_CHUNK bytes."""

    def cut(file: FileRecord) -> FileRecord:
        hasher = ChunkHasher(SMALL_CHUNK)
        hasher.update((published.folder / file.key).read_bytes())
        return file.model_copy(update={"chunks": Chunks(num_bytes=SMALL_CHUNK, sha256=hasher.digests())})

    ranks = tuple(
        record.model_copy(update={"files": tuple(cut(file) for file in record.files)}) for record in published.manifest.ranks
    )
    (published.folder / MANIFEST).write_bytes(published.manifest.model_copy(update={"ranks": ranks}).to_json())


def flip(path: Path, place: int) -> None:
    """Damage one bit where nobody looks; links of the file elsewhere stay as they are."""
    data = bytearray(path.read_bytes())
    data[place % len(data)] ^= 1 << (place % 8)
    path.unlink()
    path.write_bytes(data)


def make_keys(folder: Path) -> tuple[Path, Path]:
    """A private and a public key, P-256, made by openssl."""
    folder.mkdir(parents=True, exist_ok=True)
    private, public = folder / "key.pem", folder / "pub.pem"
    subprocess.run(["openssl", "ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", str(private)], check=True)
    subprocess.run(["openssl", "ec", "-in", str(private), "-pubout", "-out", str(public)], check=True, capture_output=True)
    return private, public


def files_below(folder: Path) -> Mapping[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
