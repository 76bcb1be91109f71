"""What a model is and how it is cut: config, topology, number formats, rules, targets, the map of weights."""
