"""Who may import whom: the table of the design as a test, read from the source with ast."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from tests.models.synthetic import model_config, random_arrays, write_source

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted(path.relative_to(ROOT) for package in ("orchestrator", "actors") for path in (ROOT / package).rglob("*.py"))
MODULES = {".".join(path.with_suffix("").parts).removesuffix(".__init__") for path in FILES}

HEAVY = frozenset(
    {
        "accelerate", "fsspec", "ml_dtypes", "modelopt", "mpi4py", "numpy", "obstore", "onnx", "onnxruntime",
        "datasets", "pyarrow", "s3fs", "safetensors", "tensorrt", "tensorrt_rtx", "torch", "transformers",
    }
)  # fmt: skip
"""What may be imported inside a function that needs it, where a row says so. Ray is not among them."""
STORAGE = frozenset({"fsspec", "obstore", "s3fs", "safetensors"})
SIGNING = frozenset({"cryptography", "model_signing"})
EVERYTHING = ("orchestrator",)
PLAIN = frozenset({"pydantic"})


@dataclass(frozen=True)
class Row:
    """What the modules of one package may import."""

    own: tuple[str, ...]
    """Prefixes of our modules."""
    at_once: frozenset[str] = frozenset()
    """Other packages, at module level."""
    inside: frozenset[str] = frozenset()
    """Other packages, inside functions or for type checking only; those of `at_once` too."""
    never: tuple[str, ...] = ()
    """Prefixes of our modules that `own` would let in."""


def _own(*names: str) -> tuple[str, ...]:
    return tuple(f"orchestrator.{name}" for name in names)


_TOP = Row(EVERYTHING, frozenset({"rich", "yaml", "pydantic"}), never=_own("cli"))
_DRIVING = Row(EVERYTHING, PLAIN, never=_own("cli"))

TABLE: dict[str, Row] = {
    "orchestrator": _TOP,
    "orchestrator.core": Row(_own("core"), PLAIN),
    "orchestrator.core.yaml_text": Row(_own("core"), PLAIN | {"yaml"}),
    "orchestrator.families": Row(_own("families", "core.config_table", "core.rules", "core.spec", "core.errors")),
    "orchestrator.stores": Row(_own("core", "stores"), STORAGE | PLAIN, frozenset({"botocore"})),
    "orchestrator.checkpoints": Row(_own("core", "families", "stores", "checkpoints"), STORAGE | {"numpy"}, frozenset({"gguf"})),
    "orchestrator.checkpoints.hub": Row(_own("core", "checkpoints"), inside=frozenset({"huggingface_hub"})),
    "orchestrator.cache": Row(_own("core", "stores"), STORAGE | PLAIN),
    "orchestrator.networks": Row(_own("core", "families", "networks"), frozenset({"numpy", "onnx"})),
    "orchestrator.quantizers": Row(_own("core", "quantizers"), frozenset({"numpy"}), HEAVY),
    "orchestrator.engines": Row(_own("core", "engines"), frozenset({"numpy"}), HEAVY),
    "orchestrator.signing": Row(_own("core"), inside=SIGNING),
    "orchestrator.layouts": Row(_own("core", "layouts")),
    "orchestrator.releases": Row(_own("core", "stores", "cache", "engines", "layouts", "signing", "releases"), PLAIN),
    "orchestrator.work": Row(
        _own(
            "core", "families", "quantizers", "networks", "engines", "checkpoints", "stores", "cache", "programs", "signing", "work"
        ),
        frozenset({"numpy", "onnx", "pydantic"}),
        HEAVY | {"nvtx", "pynvml"},
    ),
    "orchestrator.clusters": Row(_own("core", "clusters")),
    "orchestrator.clusters.local": Row(_own("core", "clusters", "work")),
    "orchestrator.clusters.processes": Row(_own("core", "clusters", "work")),
    "orchestrator.clusters.mpi": Row(_own("core", "clusters", "engines", "work"), inside=frozenset({"mpi4py"})),
    "orchestrator.report": Row(
        _own("core", "clusters", "following", "stores", "cache", "report"), frozenset({"rich"}), frozenset({"jinja2"})
    ),
    "orchestrator.report.tables": Row(_own("core", "report", "sweep"), frozenset({"rich"})),
    "orchestrator.watching": Row(_own("core", "cache", "following", "stores", "report")),
    "orchestrator.driver": _DRIVING,
    "orchestrator.programs": Row(()),
    "orchestrator.submission": Row(_own("core", "checkpoints", "following"), frozenset({"yaml"})),
    "orchestrator.following": Row(_own("core", "clusters"), PLAIN),
    "orchestrator.kubernetes": Row(
        _own("core", "following", "submission", "stores", "watching", "report", "programs", "kubernetes"),
        frozenset({"yaml"}),
        frozenset({"kubernetes", "urllib3"}),
    ),
    "orchestrator.verbs": _DRIVING,
    "orchestrator.recording": _DRIVING,
    "orchestrator.simulation": _DRIVING,
    "orchestrator.preflight": _DRIVING,
    "orchestrator.node_checks": _DRIVING,
    "orchestrator.sweep": Row(EVERYTHING, PLAIN, frozenset({"safetensors"}), never=_own("cli")),
    "orchestrator.calibrating": Row(EVERYTHING, PLAIN, frozenset({"mpi4py", "safetensors"}), never=_own("cli")),
    "orchestrator.rank_source": Row(EVERYTHING, frozenset({"numpy"}), frozenset({"safetensors"}), never=_own("cli")),
    "orchestrator.models": Row(EVERYTHING, frozenset({"numpy"}), HEAVY, never=_own("cli")),
    "orchestrator.comparison": Row(_own("core", "checkpoints"), frozenset({"numpy"}), HEAVY),
    "orchestrator.cli": Row((*EVERYTHING, "actors"), frozenset({"typer", "rich", "pydantic"}), frozenset({"yaml"})),
    "actors": Row(
        ("actors", *_own("core", "work", "stores", "clusters", "engines", "following", "submission")),
        frozenset({"ray", "pydantic"}),
        frozenset({"ray", "pynvml", "requests"}),
        never=_own("core.plan", "core.schedule", "driver", "verbs", "cli"),
    ),
}


@dataclass(frozen=True)
class Import:
    module: str
    line: int
    at_module_level: bool


def imports_of(source: str) -> Iterator[Import]:
    """Every import of a module's source; a relative one counts as an import of '.'."""
    yield from _walk(ast.parse(source), at_module_level=True)


def _walk(node: ast.AST, at_module_level: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            for alias in child.names:
                yield Import(alias.name, child.lineno, at_module_level)
        elif isinstance(child, ast.ImportFrom):
            for alias in child.names:
                yield Import(_imported(child, alias.name), child.lineno, at_module_level)
        else:
            yield from _walk(child, at_module_level and not _is_deferred(child))


def _imported(node: ast.ImportFrom, name: str) -> str:
    """`from package import name` imports package.name where that is a module of ours."""
    if node.level or node.module is None:
        return "."
    inner = f"{node.module}.{name}"
    return inner if inner in MODULES else node.module


def _is_deferred(node: ast.AST) -> bool:
    """Whether the body of `node` does not run when the module is imported."""
    if isinstance(node, ast.If):
        return ast.unparse(node.test) in {"TYPE_CHECKING", "typing.TYPE_CHECKING"}
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)


def _within(module: str, prefixes: tuple[str, ...]) -> bool:
    return any(module == prefix or module.startswith(prefix + ".") for prefix in prefixes)


def row_of(module: str) -> Row:
    """The row of the longest prefix; a new package of ours needs a row of its own."""
    candidates = [name for name in TABLE if _within(module, (name,)) and (name != "orchestrator" or module.count(".") <= 1)]
    assert candidates, f"{module} belongs to a package that the table does not name"
    return TABLE[max(candidates, key=len)]


def violations(module: str, source: str) -> list[str]:
    """Imports of `module` that its row does not allow."""
    row = row_of(module)
    return [f"line {found.line}: {found.module}" for found in imports_of(source) if not _allowed(row, found)]


def _allowed(row: Row, found: Import) -> bool:
    top = found.module.partition(".")[0]
    if top in {"orchestrator", "actors"}:
        return _within(found.module, row.own) and not _within(found.module, row.never)
    if top in sys.stdlib_module_names:
        return True
    return top in row.at_once or (top in row.inside and not found.at_module_level)


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_of_a_module_follow_the_table(path: Path) -> None:
    module = ".".join(path.with_suffix("").parts).removesuffix(".__init__")
    assert violations(module, (ROOT / path).read_text()) == []


def test_actors_only_cli_imports_them() -> None:
    importers = {
        str(path)
        for path in FILES
        if path.parts[0] != "actors" and any(_within(found.module, ("actors",)) for found in imports_of((ROOT / path).read_text()))
    }
    assert all(importer.startswith("orchestrator/cli/") for importer in importers)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("orchestrator.core.plan", "import numpy"),
        ("orchestrator.core.plan", "def f():\n    import numpy"),
        ("orchestrator.core.plan", "from orchestrator import verbs"),
        ("orchestrator.core.plan", "from . import verbs"),
        ("orchestrator.families.llama", "from orchestrator.core.plan import Plan"),
        ("orchestrator.stores.file", "from orchestrator.work.context import Context"),
        ("orchestrator.networks.decoder", "def f():\n    import torch"),
        ("orchestrator.engines.tensorrt", "import tensorrt_rtx"),
        ("orchestrator.engines.tensorrt", "def f():\n    from orchestrator.stores import open_store"),
        ("orchestrator.work.cutting", "import torch"),
        ("orchestrator.work.cutting", "if True:\n    import torch"),
        ("orchestrator.work.cutting", "try:\n    import torch\nexcept ImportError:\n    pass"),
        ("orchestrator.work.cutting", "class A:\n    import torch"),
        ("orchestrator.work.cutting", "def f():\n    import ray"),
        ("orchestrator.work.build", "def f():\n    from orchestrator import driver"),
        ("orchestrator.clusters.simulated", "from orchestrator.work import run"),
        ("orchestrator.driver", "def f():\n    import torch"),
        ("orchestrator.verbs", "def f():\n    from actors import RayCluster"),
        ("orchestrator.verbs", "import orchestrator.cli"),
        ("orchestrator.inspection", "def f():\n    import ray.util"),
        ("actors.engine", "from orchestrator.core.schedule import Schedule"),
        ("actors.engine", "def f():\n    from orchestrator.core import plan"),
        ("actors.engine", "def f():\n    import torch"),
    ],
)
def test_violations_forbidden_import_is_found(module: str, source: str) -> None:
    assert len(violations(module, source)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("orchestrator.core.plan", "import json\nfrom pydantic import BaseModel\nfrom orchestrator.core import topology"),
        ("orchestrator.work.cutting", "import numpy as np\ndef f():\n    import torch"),
        ("orchestrator.work.cutting", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch"),
        ("orchestrator.engines.tensorrt", "def f():\n    async def g():\n        import tensorrt_rtx"),
        ("orchestrator.clusters.local", "from orchestrator.work.process import die_with_parent"),
        ("orchestrator.cli", "def f():\n    from actors import RayCluster"),
        ("actors", "import ray\nfrom orchestrator import work"),
    ],
)
def test_violations_allowed_import_is_passed(module: str, source: str) -> None:
    assert violations(module, source) == []


def test_row_of_a_package_without_a_row_is_refused() -> None:
    with pytest.raises(AssertionError, match="does not name"):
        row_of("orchestrator.plugins.new")


_PROBE = """
import json, sys
import orchestrator
from orchestrator.cli import app
app(["plan", sys.argv[1], "--json"], standalone_mode=False)
print(json.dumps([name for name in sys.argv[2:] if name in sys.modules]), file=sys.stderr)
"""


def test_plan_on_the_command_line_imports_nothing_heavy(tmp_path: Path) -> None:
    config = model_config()
    source = write_source(tmp_path / "source", config, random_arrays(config))
    spec = tmp_path / "spec.yaml"
    plain = {
        "source": {"path": str(source)},
        "engine": {"max_input_len": 16, "max_seq_len": 64},
        "release": {"name": "tiny", "version": "1"},
    }
    spec.write_text(yaml.safe_dump(plain))
    heavy = ["ray", "torch", "transformers", "onnx", "onnxruntime", "tensorrt", "tensorrt_rtx", "modelopt", "s3fs"]
    done = subprocess.run([sys.executable, "-c", _PROBE, str(spec), *heavy], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "convert/stage0/group0" in [step["name"] for step in json.loads(done.stdout)["steps"]]
    assert json.loads(done.stderr.splitlines()[-1]) == []
