"""Short digests of tensors: whether a model holds the weights that a plan was made by."""

import hashlib

import numpy as np
import torch

_COLUMNS = 4093  # prime, so that rows of weights do not meet column by column
_FOLDED = 16 * _COLUMNS * 8  # bytes from which on folding is worth it


def digest(tensor: torch.Tensor) -> str:
    """16 hexadecimal digits that stand for shape, dtype and content of a tensor.

    They tell checkpoints apart and are no protection against forgery: a large tensor is summed to
    a few kilobytes first, which takes a tenth of the time that hashing all of it would.
    """
    plain = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
    found = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)}".encode())
    if plain.size >= _FOLDED:
        whole = plain.size // (_COLUMNS * 8) * _COLUMNS * 8
        numbers = plain[:whole].view(np.uint64).reshape(-1, _COLUMNS)
        found.update(np.add.reduce(numbers, axis=0).tobytes())  # modulo 2^64
        plain = plain[whole:]
    found.update(plain.tobytes())
    return found.hexdigest()[:16]
