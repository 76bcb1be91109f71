"""Planning of a build: from a spec to steps, from headers alone and without side effects."""
