"""Verify: execute every rank's graph in lockstep and compare with the reference."""
