"""A MusicGen inference service packaged with Cog. docs/architecture.md says what each module does."""

__version__ = "0.1.0"
