"""Specs of users: the build, the cluster, rates for the simulation; loading and decoding of YAML."""
