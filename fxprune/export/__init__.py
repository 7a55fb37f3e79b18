"""Artifacts: what a slim model is written to and read back from."""

from fxprune.export.save import load, save

__all__ = ["load", "save"]
