"""Weight sharing: the weights of a layer are a few numbers, and which of them is where."""

from fxprune.sharing.share import share_weights

__all__ = ["share_weights"]
