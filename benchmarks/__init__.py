"""Measurements of speed and quality. `results/` has the results that the documentation cites."""
