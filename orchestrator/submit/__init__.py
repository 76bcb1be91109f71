"""Builds submitted to a cluster: packing, following, stopping."""
