"""Tests of the command line, one file a module of `musicgen_svc/cli` or a script."""
