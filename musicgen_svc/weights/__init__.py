"""Finds the files of a model, by the model's name or by COG_WEIGHTS."""
