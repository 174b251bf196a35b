"""MusicGen behind Cog: one request in, one audio file out. Start reading at pipeline.py."""

__version__ = "0.1.0"
