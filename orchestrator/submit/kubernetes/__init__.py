"""Builds on Kubernetes: checks of manifests without a cluster, and the API of a cluster. No ray here."""

from __future__ import annotations
