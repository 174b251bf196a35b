"""From a model's name to modules on the device."""
