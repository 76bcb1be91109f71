"""Build, verify and publish TensorRT engines of large language models.

    import orchestrator

    spec = orchestrator.load_spec(Path("spec.yaml"))
    print(orchestrator.plan(spec).build_key)
    done = orchestrator.build(spec, orchestrator.ClusterSpec(store="file:///tmp/engines"))

The names below are the public ones; everything heavy is imported when it is used.
"""

from __future__ import annotations

from orchestrator.core.errors import OrchestratorError
from orchestrator.core.manifest import Manifest
from orchestrator.core.plan import Plan
from orchestrator.core.spec import BuildConfig, BuildSpec, ClusterSpec
from orchestrator.core.topology import Topology
from orchestrator.loading import load_cluster, load_spec
from orchestrator.releases import pull, read_release
from orchestrator.verbs import Build, build, convert, plan

__all__ = [
    "Build",
    "BuildConfig",
    "BuildSpec",
    "ClusterSpec",
    "Manifest",
    "OrchestratorError",
    "Plan",
    "Topology",
    "build",
    "convert",
    "load_cluster",
    "load_spec",
    "plan",
    "pull",
    "read_release",
]
