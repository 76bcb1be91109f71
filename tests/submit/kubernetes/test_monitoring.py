"""What the monitoring component watches exists, and its alerts fire when they should."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.submit.kubernetes.overlays import KUBERAY, of_kind, overlay

CASES = Path(__file__).resolve().parents[2] / "data" / "kubernetes" / "alerts.yaml"
RULES: list[dict[str, Any]] = of_kind(overlay("monitoring"), "PrometheusRule")["spec"]["groups"]
OF_PODS, OF_BUILDS = RULES
ALERTS = OF_PODS["rules"]
MONITORING = KUBERAY.parent / "monitoring"


def ray_gauges() -> set[str]:
    """Names of the gauges of Ray's nodes, as they are in Prometheus."""
    spec = importlib.util.find_spec("ray")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    source = Path(spec.submodule_search_locations[0]) / "dashboard" / "modules" / "reporter" / "reporter_agent.py"
    return {f"ray_{name}" for name in re.findall(r'^    "(\w+)": Gauge\(', source.read_text(), re.MULTILINE)}


@pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert["alert"])
def test_alert_is_of_metrics_that_ray_has_and_says_what_to_do(alert: dict[str, Any]) -> None:
    used = set(re.findall(r"\bray_\w+", alert["expr"]))
    assert used
    assert used <= ray_gauges()
    assert alert["annotations"].keys() == {"summary", "description"}


def test_alerts_there_is_a_case_of_every_one() -> None:
    said = {item["alertname"] for case in yaml.safe_load(CASES.read_text())["tests"] for item in case["alert_rule_test"]}
    assert said == {alert["alert"] for alert in ALERTS}


def test_alerts_of_builds_are_those_for_any_prometheus() -> None:
    assert yaml.safe_load((MONITORING / "alerts.yaml").read_text())["groups"] == [OF_BUILDS]


def test_dashboard_is_where_grafana_looks_for_it() -> None:
    (config,) = [obj for obj in overlay("monitoring") if obj["kind"] == "ConfigMap" and "dashboard" in obj["metadata"]["name"]]
    assert config["metadata"]["labels"] == {"grafana_dashboard": "1"}
    assert json.loads(config["data"]["dashboard.json"]) == json.loads((MONITORING / "dashboard.json").read_text())


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed: apt-get install prometheus")
def test_alerts_fire_when_they_should(tmp_path: Path) -> None:
    (tmp_path / "rules.yml").write_text(yaml.safe_dump({"groups": RULES}))
    shutil.copy(CASES, tmp_path / "cases.yml")
    done = subprocess.run(["promtool", "test", "rules", "cases.yml"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
