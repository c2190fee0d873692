"""From a YAML file to a run: reads it, checks it and assembles the objects; the only place that wires."""
