"""The models that make conditions, tokens and audio, each with the code that builds it."""
