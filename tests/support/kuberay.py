"""KubeRay's API schemas, reduced to what a check needs, and the checks that an API server makes with them.

tests/data/kuberay holds the schemas of ray.io/v1 without descriptions and status. They are made again from KubeRay's own files by

    python -m tests.support.kuberay ray.io_rayjobs.yaml ray.io_rayclusters.yaml
"""

from __future__ import annotations

import functools
import gzip
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).resolve().parents[1] / "data" / "kuberay"
KINDS = {"RayJob": "rayjobs", "RayCluster": "rayclusters"}


def reduce(path: Path) -> None:
    """Write the fixture of a CustomResourceDefinition."""
    definition = yaml.safe_load(path.read_text())
    version = next(item for item in definition["spec"]["versions"] if item["name"] == "v1")
    schema = _without_descriptions(version["schema"]["openAPIV3Schema"])
    schema["properties"].pop("status")
    text = json.dumps(schema, separators=(",", ":"), sort_keys=True)
    (FOLDER / f"{definition['spec']['names']['plural']}.json.gz").write_bytes(gzip.compress(text.encode(), 9, mtime=0))


def _without_descriptions(schema: Any, *, is_properties: bool = False) -> Any:
    if isinstance(schema, list):
        return [_without_descriptions(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: _without_descriptions(value, is_properties=key == "properties" and not is_properties)
        for key, value in schema.items()
        if is_properties or key != "description"
    }


@functools.cache
def api_schema(kind: str) -> dict[str, Any]:
    """The API server's schema of a kind, with its CEL rules."""
    schema: dict[str, Any] = json.loads(gzip.decompress((FOLDER / f"{KINDS[kind]}.json.gz").read_bytes()))
    return schema


@functools.cache
def _validator(kind: str) -> Any:
    from jsonschema import Draft202012Validator

    return Draft202012Validator(_json_schema(api_schema(kind)))


def schema_errors(obj: dict[str, Any]) -> list[str]:
    """What a strict API server finds wrong with an object: unknown fields, wrong types, missing fields."""
    found = _validator(obj["kind"]).iter_errors({key: value for key, value in obj.items() if key != "metadata"})
    return [f"{error.json_path}: {error.message[:200]}" for error in found]


def _json_schema(schema: dict[str, Any]) -> dict[str, Any]:
    """Kubernetes' structural schema as JSON Schema: unknown fields are errors, defaults satisfy `required`, null where nullable."""
    made: dict[str, Any] = {}
    for key, value in schema.items():
        if key == "properties":
            made[key] = {name: _json_schema(item) for name, item in value.items()}
        elif key in {"items", "additionalProperties", "not"} and isinstance(value, dict):
            made[key] = _json_schema(value)
        elif not key.startswith("x-kubernetes") and key != "default":
            made[key] = value
    if schema.get("x-kubernetes-int-or-string"):
        made.pop("type", None)
        made["anyOf"] = [{"type": "integer"}, {"type": "string"}]
    if "properties" in schema:
        made["required"] = [name for name in schema.get("required", []) if "default" not in schema["properties"].get(name, {})]
        if "additionalProperties" not in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
            made["additionalProperties"] = False
    if schema.get("nullable") and "type" in made:
        made["type"] = [made["type"], "null"]
    return made


def cel_errors(obj: dict[str, Any]) -> list[str]:
    """The messages of the CEL rules that an object breaks when it is created."""
    return [
        f"{path}: {rule['message']}"
        for path, value, rule in _cel_rules(api_schema(obj["kind"]), obj, "")
        if "oldSelf" not in rule["rule"] and not _holds(rule["rule"], value)
    ]


def _cel_rules(schema: dict[str, Any], value: Any, path: str) -> Iterator[tuple[str, Any, dict[str, str]]]:
    for rule in schema.get("x-kubernetes-validations", []):
        yield path, value, rule
    if isinstance(value, dict):
        for name, item in value.items():
            inner = schema.get("properties", {}).get(name) or schema.get("additionalProperties")
            if isinstance(inner, dict):
                yield from _cel_rules(inner, item, f"{path}.{name}")
    elif isinstance(value, list):
        for number, item in enumerate(value):
            yield from _cel_rules(schema.get("items", {}), item, f"{path}[{number}]")


def _holds(rule: str, value: Any) -> bool:
    import celpy

    return bool(_program(rule).evaluate({"self": celpy.json_to_cel(value)}))


@functools.cache
def _program(rule: str) -> Any:
    import celpy

    environment = celpy.Environment()
    return environment.program(environment.compile(rule))


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        reduce(Path(argument))
