"""The report of a build: one HTML file without scripts or external resources, for any screen."""

from __future__ import annotations

from orchestrator.report.html.content import Told, content_of

__all__ = ["MEDIA_TYPE", "REPORT", "Told", "render"]

REPORT = "report.html"
MEDIA_TYPE = "text/html"


def render(told: Told) -> bytes:
    """Render the page as UTF-8. All text of a build or its user is escaped. Only failed steps show their log."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("orchestrator.report.html", ""),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template("page.html").render(content_of(told)).encode()
