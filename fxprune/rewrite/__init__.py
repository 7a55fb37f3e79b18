"""From a plan to a physically smaller, trainable ``GraphModule``."""

from fxprune.rewrite.rewrite import rewrite

__all__ = ["rewrite"]
