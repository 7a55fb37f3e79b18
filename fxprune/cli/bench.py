"""What ``bench`` measured, as a table and as data."""

from dataclasses import asdict
from typing import Any

import torch
from tabulate import tabulate

from fxprune.latency.bench import Comparison, Figures
from fxprune.latency.setting import device_name

_HEADERS = ("runtime", "model", "ms", "samples/s", "peak MiB", "slim/original")
_MEMORY = (
    "peak MiB: most that PyTorch's allocator holds for one run beside weights and inputs; "
    "onnxruntime: what the process grows by, weights included"
)


def bench_report(found: tuple[Comparison, ...], setting: dict[str, Any]) -> str:
    """Both models in every runtime, and what went wrong where there are no figures."""
    rows: list[tuple[object, ...]] = []
    for c in found:
        if c.slim and c.original and c.ratio:
            rows.append((c.runtime, "original", *_cells(c.original), ""))
            rows.append((c.runtime, "slim", *_cells(c.slim), f"{c.ratio:.3f}"))
    lines = [", ".join(f"{k}: {v}" for k, v in setting.items()), ""]
    lines += [tabulate(rows, headers=_HEADERS, disable_numparse=True), "", _MEMORY]
    return "\n".join([*lines, *(f"{c.runtime}: {c.problem}" for c in found if c.problem)])


def _cells(figures: Figures) -> tuple[str, str, str]:
    peak = "" if figures.peak_bytes is None else f"{figures.peak_bytes / 2**20:.1f}"
    return f"{figures.seconds * 1e3:.2f}", f"{figures.samples_per_second:.1f}", peak


def bench_data(found: tuple[Comparison, ...], setting: dict[str, Any]) -> dict[str, Any]:
    """The same for ``--json``: seconds and bytes."""
    return {**setting, "runtimes": [asdict(c) for c in found]}


def bench_setting(inputs: tuple[Any, ...], rounds: int) -> dict[str, Any]:
    """What the figures are valid for."""
    tensors = [x for x in inputs if isinstance(x, torch.Tensor)]
    device = tensors[0].device if tensors else torch.device("cpu")
    return {
        "device": device_name(device),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "inputs": [list(t.shape) for t in tensors],
        "rounds": rounds,
    }
