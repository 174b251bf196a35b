"""Tests, and the tiny checkpoints that they and the benchmarks use."""
