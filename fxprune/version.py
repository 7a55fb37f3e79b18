"""The version of fxprune, which plans record."""

__version__ = "0.1.0"
