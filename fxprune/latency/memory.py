"""How much memory one run of a model needs at its peak."""

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from fxprune.runtimes.ready import Run


def peak_allocated(run: Run, device: torch.device) -> int:
    """Most bytes that PyTorch's allocator holds at a time for one run, beside what it held before.

    That is activations and the working memory of operators; weights and inputs lie there already.
    On a CPU the sum over the allocations and releases that PyTorch's profiler records; on CUDA,
    ``torch.cuda.max_memory_allocated``.
    """
    with torch.inference_mode():
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
            run()
            torch.cuda.synchronize(device)
            return torch.cuda.max_memory_allocated(device) - before
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
            run()
    recorded = found.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in recorded if e.name() == "[memory]")
    live = peak = 0
    for _, change in changes:
        live += change
        peak = max(peak, live)
    return peak


def resident_bytes() -> int | None:
    """Memory that this process occupies; None where the system does not say."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None
