"""One command per figure that docs/benchmarks.md quotes."""
