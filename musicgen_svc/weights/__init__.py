"""From a model's name to files."""
