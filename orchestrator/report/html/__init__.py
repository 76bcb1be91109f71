"""The report of a build: one HTML file that needs nothing else, neither script nor network, on any screen."""

from __future__ import annotations

from orchestrator.report.html.content import Told, content_of

__all__ = ["MEDIA_TYPE", "REPORT", "Told", "render"]

REPORT = "report.html"
MEDIA_TYPE = "text/html"


def render(told: Told) -> bytes:
    """The page, UTF-8. Everything that a build or its user wrote is escaped; no step's log is in it unless the step failed."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("orchestrator.report.html", ""),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template("page.html").render(content_of(told)).encode()
