"""Attention as plain operators: two products and a softmax, whatever the device offers."""

import contextlib
from collections.abc import Iterator

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel


@contextlib.contextmanager
def plain_attention() -> Iterator[None]:
    """Inside, neither fused attention kernels nor the fast path of ``nn.MultiheadAttention`` run.

    Which fused kernel is taken depends on device, dtype, mask and grad mode; a record has to be the
    same wherever it is made or run again.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
