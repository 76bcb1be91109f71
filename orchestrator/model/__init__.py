"""A model and its split over ranks: config, topology, number formats, rules, targets, weight map."""
