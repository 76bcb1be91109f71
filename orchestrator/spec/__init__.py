"""What a user writes: the build, the cluster, rates for the simulation; loading and decoding of YAML."""
