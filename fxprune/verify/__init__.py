"""Check that a slim model equals the original with the removed channels switched off."""

from fxprune.verify.compare import Verdict, first_equal, verify

__all__ = ["Verdict", "first_equal", "verify"]
