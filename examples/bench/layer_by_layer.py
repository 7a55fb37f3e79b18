"""He, Zhang and Sun's method and low-rank passes beside other ways, at equal MACs, untrained.

    python examples/bench/layer_by_layer.py VGG --ratio 0.7 0.5

Every group keeps the same share of its channels, chosen by filter norm (L1), by LASSO on the
original, and by LASSO layer by layer (``fp.ChannelPruning``); all three are reconstructed. At the
MACs that this takes, ``fp.prune(..., calibration=)`` spreads the budget by itself, and
``fp.decompose_spatial`` splits the convolutions instead. All see the same images, without labels.
"""

import argparse
import time
from collections.abc import Callable, Iterator

import torch
from fashion import NETS, Fashion, accuracy, add_options, calibration_images, load, trained
from torch import Tensor, nn

import fxprune as fp

Timed = tuple[str, nn.Module, float]


def timed(name: str, make: Callable[[], nn.Module]) -> Timed:
    """A model and the CPU seconds that it took."""
    start = time.process_time()
    model = make()
    return name, model, time.process_time() - start


def candidates(model: nn.Module, images: Tensor, ratio: float) -> Iterator[Timed]:
    """Smaller models by every way."""
    x = images[:1]
    by_group = {"ratios": ratio, "calibration": images}
    yield timed("L1", lambda: fp.prune(model, x, importance=fp.L1(), **by_group).model)
    lasso = fp.LASSO(images, ratio)
    yield timed("LASSO, original", lambda: fp.prune(model, x, importance=lasso, **by_group).model)
    method = fp.ChannelPruning(images, ratio)
    yield timed("LASSO, layer by layer", lambda: method(model, x).model)
    reached = fp.prune(model, x, ratios=ratio, importance=fp.L1()).plan.reached
    share = reached["macs"] / reached["macs_before"]
    spread = {"flops": share, "calibration": images}
    yield timed("prune(calibration=)", lambda: fp.prune(model, x, **spread).model)
    traced = fp.trace(model, x)
    for name, given in (("spatial SVD", None), ("spatial SVD, fitted", images)):
        try:
            yield timed(
                name, lambda g=given: fp.decompose_spatial(traced, flops=share, calibration=g).model
            )
        except fp.BudgetError as error:
            print(f"{name}: {error}")


def rows(model: nn.Module, data: Fashion, images: Tensor, ratio: float) -> Iterator[list[str]]:
    """Way, share of the MACs, accuracy, seconds."""
    whole = fp.analyze(fp.trace(model, images[:1])).macs.total()
    yield ["original", "100.0%", f"{accuracy(model, data):.2f}", ""]
    for name, slim, seconds in candidates(model, images, ratio):
        macs = fp.analyze(fp.trace(slim, images[:1])).macs.total()
        yield [name, f"{macs / whole:.1%}", f"{accuracy(slim, data):.2f}", f"{seconds:.1f}"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_options(parser)
    parser.add_argument("--ratio", type=float, nargs="+", default=[0.7, 0.5], help="of channels")
    parser.add_argument("--samples", type=int, default=512, help="calibration images")
    parser.add_argument("--seed", type=int, default=0, help="which calibration images")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    data = load(options.data)
    images = calibration_images(data, options.samples, options.seed)
    for name in options.nets or NETS:
        model = trained(name, data, options.cache)
        for ratio in options.ratio:
            print(f"{name}, ratio {ratio:g}: way, MACs, accuracy, CPU s")
            for way, macs, percent, seconds in rows(model, data, images, ratio):
                print(f"  {way:22} {macs:>7} {percent:>6} {seconds:>7}", flush=True)


if __name__ == "__main__":
    main()
