"""Reference: run the source model itself, layer by layer."""
