"""How a release is executed."""
