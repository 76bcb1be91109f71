"""Convert: cut the source into the shards of every rank of a stage."""
