"""Calibrate: collect the scales of some layers with Model Optimizer."""
