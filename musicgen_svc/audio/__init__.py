"""Audio: files in and out of the service."""
