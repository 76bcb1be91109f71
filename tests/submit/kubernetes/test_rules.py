"""A broken example of every rule, made from manifests that keep them all, is refused with that rule's message."""

from __future__ import annotations

import contextlib
import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.base.errors import ManifestError
from orchestrator.submit.kubernetes.rules import RULES, problems, validate
from tests.submit.kubernetes.overlays import overlay

Objects = list[dict[str, Any]]


@dataclass(frozen=True)
class Example:
    """An entry of tests/data/kubernetes/broken.yaml; see there."""

    rule: str
    where: str
    message: str
    overlay: str = "cpu-aot"
    set: dict[str, Any] = field(default_factory=dict)
    remove: tuple[str, ...] = ()
    others: tuple[str, ...] = ()

    def objects(self) -> Objects:
        objects = overlay(self.overlay)
        for path, value in self.set.items():
            holder, key = _place(objects, path)
            holder[key] = _value(key, holder.get(key) if isinstance(holder, dict) else None, value)
        for path in self.remove:
            holder, key = _place(objects, path)
            del holder[key]
        return objects


def _place(objects: Objects, path: str) -> tuple[Any, Any]:
    """The mapping or list that a path ends in, and its key there."""
    kind, colon, inner = path.partition(":")
    place: Any = next(obj for obj in objects if obj["kind"] == (kind if colon else "RayJob"))
    parts = (inner if colon else path).replace("[", ".[").split(".")
    keys = [int(part[1:-1]) if part.startswith("[") else part.replace("~", ".") for part in parts]
    for key in keys[:-1]:
        place = place[key] if isinstance(key, int) else place.setdefault(key, {})
    return place, keys[-1]


def _value(key: Any, old: Any, value: Any) -> Any:
    if key == "env":
        return [{"name": name, "value": text} for name, text in value.items()]
    if isinstance(old, list) and isinstance(value, int):
        return [copy.deepcopy(item) for _ in range(value) for item in old]
    return copy.deepcopy(value)


FILE = Path(__file__).resolve().parents[2] / "data" / "kubernetes" / "broken.yaml"
EXAMPLES = [Example(**entry) for entry in yaml.safe_load(FILE.read_text())]


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: f"{example.rule}-{example.message[:40]}")
def test_broken_example_is_refused_with_the_message_of_its_rule(example: Example) -> None:
    found = problems(example.objects())
    said = [problem for problem in found if problem.rule == example.rule]
    assert any(problem.where.endswith(f": {example.where}") and example.message in problem.message for problem in said), found
    assert {problem.rule for problem in found} == {example.rule, *example.others}, found
    assert all(problem.advice for problem in found)


def test_examples_there_is_one_of_every_rule() -> None:
    assert {example.rule for example in EXAMPLES} == {rule.id for rule in RULES}


def test_rules_have_their_own_ids_titles_and_advice() -> None:
    assert len({rule.id for rule in RULES}) == len({rule.title for rule in RULES}) == len(RULES)
    assert all(rule.title.endswith(".") and rule.advice.endswith((".", ":...")) for rule in RULES)


def test_validate_broken_manifests_raises_all_problems_with_their_advice() -> None:
    objects = Example("", "", "", remove=("spec.submissionMode", "spec.activeDeadlineSeconds")).objects()
    with pytest.raises(ManifestError) as caught:
        validate(objects)
    assert caught.value.message.splitlines() == [
        "2 broken rules",
        "  TB02 RayJob/build: spec.submissionMode: is K8sJobMode",
        "    Set submissionMode: HTTPMode.",
        "  TB03 RayJob/build: spec.activeDeadlineSeconds: is not given",
        "    Give both in seconds: how long pods may take to come, and how long the whole build may take.",
    ]


def test_pod_of_another_workload_is_held_to_pod_security() -> None:
    pod = {"containers": [{"name": "a", "image": "a:1"}]}
    obj = {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "a"}, "spec": {"template": {"spec": pod}}}
    assert [problem.rule for problem in problems([obj])] == ["PS01"] * 4


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_problems_of_any_spoiled_manifest_are_said_not_raised(data: st.DataObject) -> None:
    objects = overlay("l40s-mixed")
    for _ in range(data.draw(st.integers(1, 4))):
        holder = data.draw(st.sampled_from(_holders(objects)))
        key = data.draw(st.sampled_from(sorted(holder)))
        if data.draw(st.booleans()):
            del holder[key]
        else:
            holder[key] = data.draw(st.sampled_from([None, "text", 7, [], {}, [7], {"a": None}]))
    with contextlib.suppress(ManifestError):
        problems(objects)


def _holders(value: Any) -> list[dict[str, Any]]:
    inner = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []
    own = [value] if isinstance(value, dict) and value else []
    return own + [found for item in inner for found in _holders(item)]
