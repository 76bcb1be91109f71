"""Counters of a build: what is counted, that dashboard and alerts know these names, and that Ray really exports them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from actors.metrics import COUNTERS, GAUGES, PREFIX, Metrics
from orchestrator.events import Planned, StepFailed, StepProgressed, StepRetried, StepStarted, StepSucceeded
from orchestrator.planning.steps import Cause, Failure, FailureKind, Kind, Outcome, Output, Usage

ROOT = Path(__file__).resolve().parents[2]
MONITORING = ROOT / "deploy" / "monitoring"
LOST = Failure(kind=FailureKind.INFRASTRUCTURE, cause=Cause.NODE, message="gone")
MOVED = Failure(kind=FailureKind.HANDED_OVER, cause=Cause.DRAIN, message="taken back")
DONE = Outcome(
    digest="d", name="convert/stage0/group0", kind=Kind.CONVERT, seconds=2.5, usage=Usage(cpu_seconds=2.0),
    outputs=(Output(name="o", key="k", num_bytes=70, sha256="0"),),
)  # fmt: skip


class Ledger:
    """Keeps what would have gone to Ray."""

    def __init__(self) -> None:
        self.values: dict[tuple[str, ...], float] = {}

    def make(self, name: str) -> Any:
        labels = set((COUNTERS | GAUGES)[name][1])
        ledger = self

        class Metric:
            def inc(self, amount: float, tags: dict[str, str]) -> None:
                assert set(tags) == labels
                key = (name, *(tags[label] for label in sorted(tags)))
                ledger.values[key] = ledger.values.get(key, 0) + amount

            def set(self, amount: float, tags: dict[str, str]) -> None:
                assert set(tags) == labels
                ledger.values[(name, *tags.values())] = amount

        return Metric()


def play(metrics: Metrics) -> None:
    """A build of two steps: one lost a node and moved once, the other has just begun."""
    step = DONE.name
    metrics.tell(Planned(steps=2, pending=(step, "build/rank0"), build_key="key", already_published=False, release="tiny/1"))
    for event in (
        StepStarted(digest="d", node="n", attempt=1), StepFailed(digest="d", failure=LOST),
        StepStarted(digest="d", node="n", attempt=2), StepFailed(digest="d", failure=MOVED),
    ):  # fmt: skip
        metrics.tell(event.model_copy(update={"step": step}))
    metrics.tell(StepRetried(digest="d", step=step, attempt=2, delay_seconds=1.0))
    metrics.tell(StepStarted(digest="d", step=step, node="n", attempt=3))
    metrics.tell(StepProgressed(digest="d", step=step, phase="convert", done=50, total=50, unit="bytes"))
    metrics.tell(StepSucceeded(digest="d", step=step, outcome=DONE))
    metrics.tell(StepStarted(digest="e", step="build/rank0", node="n", attempt=1))


def test_metrics_count_a_build() -> None:
    ledger = Ledger()
    play(Metrics(ledger.make))
    assert ledger.values == {
        ("trt_build_steps_total", "convert", "tiny/1", "failed"): 1,
        ("trt_build_steps_total", "convert", "tiny/1", "moved"): 1,
        ("trt_build_steps_total", "convert", "tiny/1", "succeeded"): 1,
        ("trt_build_step_seconds_total", "convert", "tiny/1") : 2.5,
        ("trt_build_step_cpu_seconds_total", "convert", "tiny/1"): 2.0,
        ("trt_build_read_bytes_total", "convert", "tiny/1"): 50,
        ("trt_build_written_bytes_total", "convert", "tiny/1"): 70,
        ("trt_build_retries_total", "convert", "tiny/1"): 1,
        ("trt_build_failures_total", "node", "none", "infrastructure", "convert", "tiny/1"): 1,
        ("trt_build_steps_pending", "tiny/1"): 1,
        ("trt_build_steps_running", "tiny/1"): 1,
    }  # fmt: skip


def test_dashboard_and_alerts_ask_for_names_and_labels_that_are_exported() -> None:
    dashboard = json.loads((MONITORING / "dashboard.json").read_text())
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    expressions += [item["query"] for item in dashboard["templating"]["list"] if item["type"] == "query"]
    rules = yaml.safe_load((MONITORING / "alerts.yaml").read_text())["groups"][0]["rules"]
    expressions += [rule["expr"] for rule in rules]
    known = {PREFIX + name: labels for name, (_, labels) in (COUNTERS | GAUGES).items()}
    used = set()
    for expression in expressions:
        names = re.findall(r"ray_trt_\w+", expression)
        assert names, expression
        used.update(names)
        asked = {word for group in re.findall(r"by \(([^)]*)\)", expression) for word in re.split(r",\s*", group)}
        asked |= set(re.findall(r"(\w+)=~?\"", expression))
        for name in names:
            assert name in known, expression
            assert asked <= set(known[name]) | {"result"}, expression
    assert used == set(known)


SCRAPED = """
import json, sys, time, urllib.request
import ray
from actors.metrics import Metrics
from tests.actors.test_metrics import play
ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR", object_store_memory=10**8,
         _system_config={"metrics_report_interval_ms": 500})
play(Metrics())
node = ray.nodes()[0]
url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
deadline, text = time.monotonic() + 60, ""
while time.monotonic() < deadline and "ray_trt_build_steps_running" not in text:
    try:
        text = opener.open(url, timeout=5).read().decode()
    except OSError:
        pass
    time.sleep(0.2)
print(json.dumps([line for line in text.splitlines() if line.startswith("ray_trt_")]))
ray.shutdown()
"""


def test_ray_exports_the_counters_on_its_metrics_port() -> None:
    done = subprocess.run([sys.executable, "-c", SCRAPED], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    lines = json.loads(done.stdout.splitlines()[-1])
    names = {re.split(r"[{ ]", line)[0] for line in lines}
    assert {PREFIX + name for name in COUNTERS | GAUGES} <= names
    seconds = next(line for line in lines if line.startswith("ray_trt_build_step_seconds_total{"))
    assert 'kind="convert"' in seconds
    assert 'release="tiny/1"' in seconds
    assert seconds.endswith(" 2.5")
