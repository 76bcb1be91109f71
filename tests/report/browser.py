"""Headless Chromium: what a page measures, and what it looks like."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

MEASURE = """
<script>addEventListener("load", () => {
  const pictures = [...document.querySelectorAll("svg")].map(svg => svg.getBoundingClientRect());
  const outside = [...document.querySelectorAll("body *")].filter(
    found => !found.closest(".wide, pre, svg") && found.getBoundingClientRect().right > innerWidth + 0.5);
  parent.postMessage(JSON.stringify({
    width: innerWidth, scroll: document.documentElement.scrollWidth, height: document.documentElement.scrollHeight,
    outside: outside.map(found => found.outerHTML.slice(0, 120)),
    pictures: pictures.map(box => [box.width, box.height]),
    text: document.body.innerText,
  }), "*");
});</script>
"""
"""Goes into a copy of the page: the page itself runs no script."""
FRAME = """<!DOCTYPE html><body style="margin:0;background:#888"><script>
addEventListener("message", told => { document.documentElement.dataset.measured = told.data; });
</script><iframe src="%s" width="%d" height="%d" style="border:0;display:block"></iframe>"""
"""A window cannot be narrower than 500 pixels; a frame is as wide as a phone."""


def find_chromium() -> str | None:
    """The browser's path."""
    return shutil.which("chromium")


def _run(page: Path, *options: str) -> str:
    with tempfile.TemporaryDirectory() as profile:
        command = [
            str(find_chromium()), "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars",
            "--no-first-run", f"--user-data-dir={profile}", *options, page.resolve().as_uri(),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout


def measure(page: Path, width: int) -> dict[str, Any]:
    """Width and height of the page in a window of so many pixels, its pictures, its text, and what sticks out of it."""
    source = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', lambda match: MEASURE, page.read_text(), count=1)
    copy, frame = (page.with_suffix(f".{width}.{name}.html") for name in ("measured", "frame"))
    copy.write_text(source)
    frame.write_text(FRAME % (copy.name, width, 900))
    dom = _run(frame, "--dump-dom", "--virtual-time-budget=3000")
    copy.unlink()
    frame.unlink()
    match = re.search(r'data-measured="([^"]*)"', dom)
    assert match is not None, dom[:500]
    found: dict[str, Any] = json.loads(html.unescape(match.group(1)))
    return found


def screenshot(page: Path, target: Path, width: int, height: int, *, dark: bool = False) -> Path:
    """A PNG of the top of the page."""
    target.parent.mkdir(parents=True, exist_ok=True)
    scheme = ["--blink-settings=preferredColorScheme=0"] if dark else []
    frame = page.with_suffix(f".{width}.frame.html")
    frame.write_text(FRAME % (page.name, width, height))
    _run(frame, f"--screenshot={target.resolve()}", f"--window-size={max(width, 500)},{height}", *scheme)
    frame.unlink()
    return target
