"""Checkpoints in safetensors files: read and written tensor by tensor, and told apart."""

from fxprune.checkpoint.digests import digest
from fxprune.checkpoint.read import Checkpoint
from fxprune.checkpoint.write import write_tensors

__all__ = ["Checkpoint", "digest", "write_tensors"]
