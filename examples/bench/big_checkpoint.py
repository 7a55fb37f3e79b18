"""Plan and slim a checkpoint that is larger than the memory that it takes.

    python examples/bench/big_checkpoint.py --folder /tmp/big

Needs 15 GB of disk for a while. Writes random bfloat16 weights of a Llama-style decoder
(decoder.py) as Hugging Face shards, plans from them with the model on the meta device, slices the
shards, compares what came out with the original tensor by tensor, and deletes everything. Each
stage is a process of its own, and its peak of resident memory is what the kernel says (VmHWM:
mapped pages of files count too).
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from decoder import LARGE, Config, Decoder
from safetensors import safe_open

import fxprune as fp
from fxprune.checkpoint import write_tensors
from fxprune.checkpoint.read import INDEX, Stored

SHARD = 2**30  # bytes
SMALL = Config(2000, 256, 512, 2, 8, 2)
CRITERIA = {"l1": fp.L1, "l2": fp.L2, "cpmc": fp.CPMC}


def meta_decoder(config: Config) -> Decoder:
    with torch.device("meta"):
        return Decoder(config).to(torch.bfloat16).eval()


def write(folder: Path, config: Config) -> None:
    """Random weights whose rows are of different strength, in shards of about 1 GiB."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)

    def read(name: str) -> Iterator[torch.Tensor]:
        weight = torch.empty(shapes[name], dtype=torch.bfloat16)
        strength = torch.rand(len(weight), generator=generator).add_(0.5) / weight.shape[-1] ** 0.5
        for start in range(0, len(weight), 2048):
            rows = weight[start : start + 2048].normal_(generator=generator)
            yield rows.mul_(strength[start : start + 2048].view(-1, *[1] * (rows.ndim - 1)))

    shapes = {name: tuple(t.shape) for name, t in meta_decoder(config).state_dict().items()}
    shards: list[dict[str, Stored]] = [{}]
    for name, shape in shapes.items():
        size = 2 * torch.Size(shape).numel()
        if sum(entry.size for entry in shards[-1].values()) + size > SHARD and shards[-1]:
            shards.append({})
        shards[-1][name] = Stored(folder, "BF16", shape, 0, size)
    where = {}
    for k, shard in enumerate(shards, 1):
        file = f"model-{k:05}-of-{len(shards):05}.safetensors"
        write_tensors(folder / file, shard, read, {"format": "pt"})
        where |= dict.fromkeys(shard, file)
    total = sum(entry.size for shard in shards for entry in shard.values())
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / INDEX).write_text(json.dumps(index, indent=2))


def plan(folder: Path, out: Path, config: Config, criterion: str, params: float) -> None:
    """Plan from the checkpoint with a model that holds no weights."""
    traced = fp.trace(
        meta_decoder(config), torch.zeros(1, 64, dtype=torch.long), weights=fp.Checkpoint(folder)
    )
    deps, made_by = fp.analyze(traced), CRITERIA[criterion]()
    chosen = fp.plan(
        deps, made_by(deps), params=params, allocation="uniform", criterion=made_by
    )  # uniform: the width of the stream, heads and inner widths all shrink
    chosen.save(out)


def compare(folder: Path, slim: Path, plan_file: Path) -> None:
    """Every tensor of the slim checkpoint against rows and columns of the original."""
    found, chosen = fp.Checkpoint(slim), fp.PruningPlan.load(plan_file)
    files = json.loads((folder / INDEX).read_text())["weight_map"]
    for name in found:
        with safe_open(folder / files[name], "pt") as opened:
            expected = opened.get_tensor(name)
            for axis in chosen.axes_of.get(name, ()):
                expected = expected.index_select(axis.axis, torch.tensor(axis.kept))
            assert torch.equal(found[name], expected), name
    assert set(found) == set(files)


def peak() -> float:
    """Largest resident memory of this process so far, in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1000


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path("/tmp/fxprune-big"), help="new folder")
    parser.add_argument("--criterion", choices=CRITERIA, default="cpmc")
    parser.add_argument("--params", type=float, default=0.6, help="share of parameters to keep")
    parser.add_argument("--small", action="store_true", help="a model of a few megabytes instead")
    parser.add_argument("--stage", choices=("write", "plan", "apply", "compare"), help="only this")
    options = parser.parse_args()
    config = SMALL if options.small else LARGE
    large, slim, file = (options.folder / name for name in ("large", "slim", "plan.json"))
    stages = {
        "write": lambda: write(large, config),
        "plan": lambda: plan(large, file, config, options.criterion, options.params),
        "apply": lambda: fp.apply_plan(large, fp.PruningPlan.load(file), out=slim),
        "compare": lambda: compare(large, slim, file),
    }
    if options.stage:
        torch.set_num_threads(2)
        start = time.perf_counter()
        stages[options.stage]()
        print(f"{options.stage}: {time.perf_counter() - start:.1f} s, peak {peak():,.0f} MB")
        return
    if options.folder.exists():
        raise SystemExit(f"{options.folder} exists; name a new folder with --folder")
    try:
        for stage in stages:
            subprocess.run([sys.executable, *sys.argv, "--stage", stage], check=True)
        sizes = [sum(f.stat().st_size for f in d.iterdir()) / 1e9 for d in (large, slim)]
        print(f"{sizes[0]:.2f} GB -> {sizes[1]:.2f} GB; every tensor is what the plan keeps of it")
        print(fp.PruningPlan.load(file).report())
    finally:
        shutil.rmtree(options.folder, ignore_errors=True)


if __name__ == "__main__":
    main()
