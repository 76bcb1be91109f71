"""Default verification text, used when the spec names none. Written for this project; under its licence."""

from __future__ import annotations

PROMPTS: tuple[str, ...] = (
    "A lighthouse keeper writes down the weather every evening. On Monday the wind came from the north and the sea was "
    "grey. On Tuesday it turned to the west, and by Wednesday morning the harbour was full of boats waiting for the storm "
    "to pass. He counted eleven of them before the light failed.",
    "To compute the mean of a list of numbers, add them all and divide the sum by how many there are. In Python this is "
    "sum(values) / len(values), which fails when the list is empty, so check for that first.",
    "The capital of France is Paris, and the river that runs through it is the Seine.",
    "Water boils at a lower temperature on a mountain than at the sea, because the pressure of the air above it is lower. "
    "This is why potatoes take longer to cook at a high camp, and why the instructions on a packet of pasta are written "
    "for people who live near the coast.",
)
"""Prompts of different lengths, so that a batch is padded."""
