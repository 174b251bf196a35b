"""MusicGen as a Cog service: one request in, one audio file out. To read the code, start at `predict.py`."""

__version__ = "0.1.0"
