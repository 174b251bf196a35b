"""The models beside the decoder, each with what builds it."""
