"""The models beside the language model's decoder, each with the code that builds it."""
