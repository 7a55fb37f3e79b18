"""Check that a slim model equals the original with the removed channels switched off."""

from fxprune.verify.compare import Verdict, verify

__all__ = ["Verdict", "verify"]
