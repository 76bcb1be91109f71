"""The report: complete, escaped, without secrets, small at any size, and looked at in a browser."""

from __future__ import annotations

import dataclasses
import os
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator import building
from orchestrator.base.errors import StepFailedError, StoreError
from orchestrator.events import NodesProbed, Planned, StepFailed, StepStarted, StepSucceeded
from orchestrator.events.nodes import NodeFacts
from orchestrator.planning.facts import ConvertFacts, Facts, Verification, VerifyFacts
from orchestrator.planning.plan import Plan
from orchestrator.planning.steps import Cause, Failure, FailureKind, Kind, Outcome, Output, Step
from orchestrator.report import recording
from orchestrator.report.html import REPORT, Told, render
from orchestrator.report.html.errors_plot import by_layer, errors_picture
from orchestrator.report.html.svg import ticks
from orchestrator.report.html.timeline import time_ticks
from orchestrator.report.story import Story
from orchestrator.spec.cluster import ClusterSpec
from tests.report.browser import find_chromium, measure, screenshot
from tests.support.releases import Published, publish_tiny, release_spec, tiny_source

LOST = Failure(
    kind=FailureKind.INFRASTRUCTURE, cause=Cause.NODE, message="the node <died>", node="node-1", kernel="oom-kill: & more"
)
WRONG = Failure(
    kind=FailureKind.APPLICATION, message="70000 does not fit", advice="use bfloat16", error="DtypeError", node="node-0",
    traceback="Traceback <b>here</b>", log_tail="the log's end", worker_log="stderr of it", rank=1, attempt=2,
)  # fmt: skip
SCREENSHOTS = Path(os.environ.get("SCREENSHOTS", Path(__file__).resolve().parents[2] / ".cache" / "screenshots"))


class Checker(HTMLParser):
    """Collects what a page refers to, and fails on tags that do not close."""

    VOID = {"meta", "link", "br", "img", "input"}

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.references: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.references += [
            value or "" for name, value in attrs if name in {"src", "href", "action", "data"} or name.startswith("on")
        ]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def checked(data: bytes) -> Checker:
    found = Checker()
    found.feed(data.decode())
    assert found.open == []
    return found


def outcome(step: Step, node: str, began: float, seconds: float) -> Outcome:
    facts = Facts(peak_memory_bytes=150 * 10**6)
    if step.kind is Kind.CONVERT:
        names = ("attention.qkv", "attention.dense", "mlp.fc", "mlp.gate", "mlp.proj")
        errors = {f"transformer.layers.{layer}.{name}": 0.02 + 0.001 * layer for layer in range(4) for name in names}
        facts = ConvertFacts(quantization_errors=errors, peak_memory_bytes=150 * 10**6)
    output = Output(name="out", key=f"steps/{step.digest}/a/out", num_bytes=10**6, sha256="0" * 64)
    return Outcome(digest=step.digest, name=step.name, kind=step.kind, outputs=(output,), facts=facts, node=node, seconds=seconds)


def told(plan: Plan, published: Published | None = None, failing: bool = False) -> Told:
    """A run on two nodes: the first step is cached, one was retried, and with `failing` the last one failed."""
    story = Story()
    story.tell(Planned.of(plan, plan.steps).model_copy(update={"warnings": ("mind <the> gap",), "time": 100.0}))
    nodes = tuple(NodeFacts(node=f"node-{number}", cpus=8, memory_bytes=64 * 10**9) for number in range(2))
    story.tell(NodesProbed(nodes=nodes, time=100.5))
    outcomes, at = {plan.steps[0].digest: outcome(plan.steps[0], "node-0", 0, 3.0)}, 101.0
    for number, step in enumerate(plan.steps[1:]):
        node = f"node-{number % 2}"
        story.tell(StepStarted(digest=step.digest, step=step.name, node=node, attempt=1, time=at))
        if number == 1:
            story.tell(StepFailed(digest=step.digest, step=step.name, failure=LOST, time=at + 1))
            story.tell(StepStarted(digest=step.digest, step=step.name, node=node, attempt=2, time=at + 2))
        if failing and step is plan.steps[-1]:
            story.tell(StepFailed(digest=step.digest, step=step.name, failure=WRONG, time=at + 4))
            continue
        outcomes[step.digest] = outcome(step, node, at, 4.0)
        story.tell(StepSucceeded(digest=step.digest, step=step.name, outcome=outcomes[step.digest], time=at + 4))
        at += 3.0
    ran = frozenset(outcomes) - {plan.steps[0].digest}
    failures = {plan.steps[-1].digest: WRONG} if failing else {}
    lost = {plan.steps[2].digest: [LOST]}
    manifest = published.manifest if published and not failing else None
    return Told(plan, outcomes, ran, story, manifest, failures, lost, WRONG.message if failing else "")


@pytest.fixture
def published(tmp_path: Path) -> Published:
    return publish_tiny(tmp_path, quantization={"algorithm": "FP8"})


def test_report_is_published_with_the_release_and_needs_nothing_else(published: Published, tmp_path: Path) -> None:
    (record,) = published.manifest.documents
    assert (record.path, record.role, record.media_type) == (REPORT, "report", "text/html")
    data = published.store.get(f"releases/tiny/1/{record.key}")
    assert len(data) == record.num_bytes
    found = checked(data)
    assert found.references == []
    assert not found.tags & {"script", "link", "img", "iframe"}
    text = data.decode()
    assert "default-src 'none'" in text
    assert not re.search(r"url\(|@import|http-equiv=.refresh", text)
    assert str(tmp_path) not in text
    assert "a log may hold anything" not in text
    assert published.plan.build_key in text


def test_build_writes_the_report_and_again_that_of_the_release(tmp_path: Path) -> None:
    spec, place = release_spec(tiny_source(tmp_path / "source")), ClusterSpec(store=(tmp_path / "store").as_uri())
    first = publish_tiny(tmp_path)
    building.build(spec, place, report=tmp_path / "again.html")
    (record,) = first.manifest.documents
    assert (tmp_path / "again.html").read_bytes() == first.store.get(f"releases/tiny/1/{record.key}")


def test_build_that_fails_writes_its_report_and_publishes_none(tmp_path: Path) -> None:
    spec = release_spec(tiny_source(tmp_path / "source"))

    def no_cluster(place: ClusterSpec) -> object:
        raise StepFailedError("no <cluster> today")

    with pytest.raises(StepFailedError):
        building.build(spec, ClusterSpec(store=(tmp_path / "store").as_uri()), open_cluster=no_cluster, report=tmp_path / "r.html")  # type: ignore[arg-type]
    text = (tmp_path / "r.html").read_text()
    assert "no &lt;cluster&gt; today" in text
    assert "verified and published" not in text


def test_build_whose_report_cannot_be_written_is_refused_before_it_begins(tmp_path: Path) -> None:
    spec, place = release_spec(tiny_source(tmp_path / "source")), ClusterSpec(store=(tmp_path / "store").as_uri())
    for path in (tmp_path, tmp_path / "nowhere" / "r.html"):
        with pytest.raises(StoreError, match="cannot write the report"):
            building.build(spec, place, report=path)
    assert not (tmp_path / "store").exists()


def test_page_of_a_failed_build_has_the_failure_record_escaped(published: Published) -> None:
    data = render(told(published.plan, failing=True))
    checked(data)
    text = data.decode()
    for part in ("70000 does not fit", "use bfloat16", "node-0", "&lt;b&gt;here&lt;/b&gt;", "the log&#39;s end", "stderr of it"):
        assert part in text
    for part in ("the node &lt;died&gt;", "oom-kill: &amp; more", "mind &lt;the&gt; gap"):
        assert part in text
    assert "<died>" not in text
    assert "manifest.json" not in text


def test_page_shows_states_errors_and_nodes(published: Published) -> None:
    text = render(told(published.plan, published)).decode()
    assert text.count("<svg") == 3
    assert published.manifest.miniature is not None
    assert published.manifest.miniature.line() in text
    for part in ("node-0", "node-1", "mlp.proj", "transformer.layers.3.", "attempt 2", "150.0 MB", "1 of them retries"):
        assert part in text, part
    assert 'class="miniature cached"' in text
    assert len(re.findall(r'<rect [^>]*class="\w+ failed"', text)) == 1


def test_page_of_64_ranks_and_thousands_of_steps_stays_small(published: Published) -> None:
    plan = published.plan
    template = next(plan.of_kind(Kind.CONVERT))
    builds = next(plan.of_kind(Kind.BUILD))
    converts = [
        template.model_copy(
            update={"name": f"convert/stage{layer % 8}/group{layer}-{rank}", "options": {"n": layer * 64 + rank}, "needs": ()}
        )
        for layer in range(126)
        for rank in range(64)
    ]
    ranks = [
        builds.model_copy(update={"name": f"build/rank{rank}", "options": {"n": -rank - 1}, "needs": (converts[rank].digest,)})
        for rank in range(64)
    ]
    large = dataclasses.replace(plan, steps=(*converts, *ranks))
    manifest = published.manifest
    records = tuple(manifest.ranks[0].model_copy(update={"rank": rank}) for rank in range(64))
    wide = dataclasses.replace(published, manifest=manifest.model_copy(update={"ranks": records}))
    data = render(told(large, wide))
    checked(data)
    assert len(data) < 2_000_000
    assert "faster ones are left out" in data.decode()


def test_by_layer_takes_the_worst_of_a_layers_experts() -> None:
    names = {"transformer.layers.0.mlp.experts.3.fc": 0.1, "transformer.layers.0.mlp.experts.4.fc": 0.3, "lm_head": 9.0}
    assert by_layer(names) == {"mlp.experts.fc": {0: 0.3}}


@pytest.mark.parametrize("most", [0.0, 0.004, 0.9, 7.0, 59.0, 86400.0])
def test_ticks_are_few_and_within(most: float) -> None:
    found = ticks(most)
    assert found[0] == 0
    assert found[-1] <= most
    assert 1 <= len(found) <= 8


@pytest.mark.parametrize("span", [0.05, 1.0, 59.0, 3600.0, 86400.0, 3e6])
def test_time_ticks_are_few_and_within(span: float) -> None:
    found = time_ticks(span)
    assert (found[0], found[-1] <= span) == (0, True)
    assert 2 <= len(found) <= 9 or span < 0.1


@pytest.mark.skipif(find_chromium() is None, reason="chromium is not installed (Debian package chromium)")
@pytest.mark.parametrize("case", ["published", "failed"])
def test_page_in_a_browser_fits_its_window_and_draws_its_pictures(published: Published, tmp_path: Path, case: str) -> None:
    page = tmp_path / f"{case}.html"
    page.write_bytes(render(told(published.plan, published, failing=case == "failed")))
    for width in (390, 1280):
        found = measure(page, width)
        assert (found["width"], found["scroll"], found["outside"]) == (width, width, [])
        assert len(found["pictures"]) == 3
        assert all(box[0] > 300 and box[1] > 60 for box in found["pictures"])
        for heading in (
            "Plan",
            "Timeline",
            "Bytes and rates",
            "Quantization",
            "Nodes",
            "70000" if case == "failed" else "Manifest",
        ):
            assert heading in found["text"]
        shot = screenshot(page, SCREENSHOTS / f"report-{case}-{width}.png", width, min(found["height"], 6000))
        assert shot.stat().st_size > 20_000
    print(f"screenshots: {SCREENSHOTS}")


def test_page_of_a_verified_build_has_the_error_of_every_layer(published: Published) -> None:
    shown = told(published.plan, published)
    assert shown.manifest is not None
    digest = next(iter(shown.outcomes))
    facts = VerifyFacts(layer_errors={layer: 1e-6 * (layer + 1) for layer in range(5)})
    outcomes = {**shown.outcomes, digest: shown.outcomes[digest].model_copy(update={"facts": facts})}
    numbers = Verification(
        num_positions=3, max_absolute_error=1e-5, max_relative_error=5e-6, mean_kl=0.0, top1_agreement=1.0, perplexity_ratio=None
    )
    manifest = shown.manifest.model_copy(update={"verification": numbers})
    text = render(replace(shown, outcomes=outcomes, manifest=manifest)).decode()
    assert "Verification error by layer" in text
    assert "layer 4, hidden states: 5e-06" in text


@given(st.dictionaries(st.sampled_from(range(5)), st.just(0.0) | st.floats(1e-9, 10), min_size=1))
def test_errors_picture_of_any_errors_is_drawn(errors: dict[int, float]) -> None:
    named = {f"transformer.layers.{layer}.mlp.fc": error for layer, error in errors.items()}
    assert errors_picture(by_layer(named), "Errors", "linears").count("<circle") == len(named)


def test_errors_picture_of_errors_that_are_all_the_same_is_drawn() -> None:
    same = {"mlp.fc": {0: 0.00403, 1: 0.00403}}
    assert "<circle" in errors_picture(same, "Errors", "linears")


def test_drawn_report_that_cannot_be_drawn_is_a_page_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(told: object) -> bytes:
        raise ZeroDivisionError("a <picture>")

    monkeypatch.setattr(recording, "render", broken)
    page = recording.drawn(None).decode()  # type: ignore[arg-type]
    assert "could not be drawn" in page
    assert "a &lt;picture&gt;" in page
