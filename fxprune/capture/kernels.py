"""Kernels that leave a record of plain operators, whatever the device offers."""

import contextlib
from collections.abc import Iterator

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel


@contextlib.contextmanager
def plain_kernels() -> Iterator[None]:
    """Inside, attention is two products and a softmax, and recurrent layers are their cells.

    Which fused kernel is taken otherwise depends on device, dtype, mask and grad mode; a record
    has to be the same wherever it is made or run again.
    """
    fast, recurrent = torch.backends.mha.get_fastpath_enabled(), torch._C._get_mkldnn_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    torch._C._set_mkldnn_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        torch._C._set_mkldnn_enabled(recurrent)
