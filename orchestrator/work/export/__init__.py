"""Export steps: the portable graph of a stage, executed before it is published."""
