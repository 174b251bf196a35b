"""Loads models: turns a model's name into modules on the device."""
