"""The life of a release on a real S3 server, with real engines of a tiny model. Of a real model: `make storage`, `make ceph`."""

from __future__ import annotations

import uuid
from pathlib import Path

from tests.support.demo import Demo, run_here
from tests.support.s3_server import SECRET, S3Server


def test_demo_in_object_storage_shows_every_step(s3_environment: S3Server, tiny_llama: Path, tmp_path: Path) -> None:
    spec = {
        "source": {"path": str(tiny_llama)},
        "topology": {"pp": 2},
        "engine": {"max_batch_size": 2, "max_input_len": 16, "max_seq_len": 64},
        "verification": {"max_tokens": 12, "decode_steps": 3},
        "release": {"name": "tiny"},
    }
    store = f"s3://{s3_environment.bucket}/{uuid.uuid4().hex}"
    demo = Demo(tmp_path / "demo", store, spec, run=run_here, secrets=(SECRET,))
    shown = {name: result for name, _, result in demo.walk()}
    assert len(shown) == 17
