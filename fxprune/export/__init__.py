"""Artifacts: what a slim model is written to and read back from."""
