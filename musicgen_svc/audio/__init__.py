"""Audio files: reading them, setting the level, writing them."""
