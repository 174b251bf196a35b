"""Measurements of speed and quality; `results/` has what they found."""
