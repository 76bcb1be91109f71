"""Flat layout: files under their paths, with manifest.json and the signature, exactly as signed."""

from __future__ import annotations

from orchestrator.releases.layouts import Arrangement, Request, identity_files


def arrange(request: Request) -> Arrangement:
    """See Layout."""
    return Arrangement({file.path: file.path for file in request.files}, identity_files(request))
