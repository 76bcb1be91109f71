"""From a spec to the steps of a build: pure, from headers alone."""
