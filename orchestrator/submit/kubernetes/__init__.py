"""Builds on Kubernetes: what can be said about manifests without a cluster, and the API of one. No ray here."""

from __future__ import annotations
