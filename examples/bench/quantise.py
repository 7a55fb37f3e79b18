"""Pruning, then fewer bits: accuracy and size of fp32, slim, and slim with int8 or codebooks.

    python examples/bench/quantise.py                 # all networks, half of the MACs
    python examples/bench/quantise.py VGG --keep 0.3 --epochs-after 1

Each network is pruned and reconstructed by ``fp.prune(..., calibration=)``, without training and
labels. The slim model then goes through torchao as it is, statically to int8 for x86 processors
(PT2E, weights and activations, calibrated on the same images) and to int8 weights only, and
through ``fp.share_weights``. Sizes are those of files: safetensors of what the model needs. With
``--epochs-after`` the codebooks are trained on all images, with the original as teacher.
"""

import argparse
import copy
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import safetensors.torch
import torch
from fashion import NETS, Fashion, accuracy, add_options, calibration_images, load, trained
from tabulate import tabulate
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

import fxprune as fp


class Row(NamedTuple):
    """One form of one network: accuracy in percent, size of its file in bytes."""

    net: str
    form: str
    accuracy: float
    size: int


def file_size(tensors: dict[str, Tensor]) -> int:
    """Bytes of a safetensors file with these tensors."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "tensors.safetensors"
        safetensors.torch.save_file({k: t.contiguous() for k, t in tensors.items()}, file)
        return file.stat().st_size


class Fixed(nn.Module):
    """A quantised program, which has no modes of its own, as a module."""

    def __init__(self, program: nn.Module) -> None:
        super().__init__()
        self._program = [program]  # out of reach of train() and eval()

    def forward(self, x: Tensor) -> Tensor:
        return self._program[0](x)


def static_int8(slim: nn.Module, images: Tensor) -> tuple[nn.Module, dict[str, Tensor]]:
    """Weights and activations in int8, scales calibrated on images; and the tensors it needs."""
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    example = (images[:2],)
    dynamic = ({0: torch.export.Dim.AUTO},)
    program = torch.export.export(slim.eval(), example, dynamic_shapes=dynamic).module()
    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config())
    prepared = prepare_pt2e(program, quantizer)
    with torch.no_grad():
        for batch in images.split(64):
            prepared(batch)
    converted = convert_pt2e(prepared)
    again = torch.export.export(converted, example, dynamic_shapes=dynamic)
    needed = {**dict(again.named_parameters()), **dict(again.named_buffers()), **again.constants}
    used = used_tensors(again)
    return Fixed(converted), {k: t.detach() for k, t in needed.items() if k in used}


def used_tensors(program: torch.export.ExportedProgram) -> set[str]:
    """Names of the tensors that a program reads; quantised ones keep the float weights about."""
    read = {n.name for n in program.graph.find_nodes(op="placeholder") if n.users}
    return {s.target for s in program.graph_signature.input_specs if s.arg.name in read}


def weight_only_int8(slim: nn.Module) -> tuple[nn.Module, dict[str, Tensor]]:
    """Weights of linear layers in int8; and the tensors that the model needs."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = copy.deepcopy(slim)
    quantize_(model, Int8WeightOnlyConfig())
    return model, dict(plain_tensors(model.state_dict()))


def plain_tensors(state: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """A state_dict with the parts of tensors that are made of several."""
    for name, tensor in state.items():
        if hasattr(tensor, "__tensor_flatten__"):
            yield from ((f"{name}.{k}", getattr(tensor, k)) for k in tensor.__tensor_flatten__()[0])
        else:
            yield name, tensor


def trained_codebooks(shared: nn.Module, teacher: nn.Module, data: Fashion, epochs: int, seed: int):
    """The shared model after training on all images, taught by the original."""
    images = TensorDataset(data.train_images, data.train_classes)
    order = BatchSampler(RandomSampler(images), batch_size=128, drop_last=True)
    loader = DataLoader(images, sampler=order, batch_size=None)
    return fp.finetune(
        shared, loader, teacher=teacher, epochs=epochs, lr=1e-3, weight_decay=0, seed=seed
    ).model


def measure(name: str, model: nn.Module, data: Fashion, options: argparse.Namespace) -> list[Row]:
    """All forms of one network."""
    images = calibration_images(data, options.samples, options.seed)
    slim = fp.prune(model, images[:2], flops=options.keep, calibration=images).model
    rows = [
        Row(name, "fp32", accuracy(model, data), file_size(model.state_dict())),
        Row(name, f"slim, {options.keep:.0%}", accuracy(slim, data), file_size(slim.state_dict())),
    ]
    for form, (smaller, tensors) in {
        "slim + int8, static": static_int8(slim, images),
        "slim + int8, weights of linear layers": weight_only_int8(slim),
    }.items():
        rows.append(Row(name, form, accuracy(smaller, data), file_size(tensors)))
    for bits in options.bits:
        shared = fp.share_weights(slim, bits)
        size, form = file_size(shared.state_dict()), f"slim + codebooks of {2**bits}"
        rows.append(Row(name, form, accuracy(shared, data), size))
        if options.epochs_after:
            shared = trained_codebooks(shared, model, data, options.epochs_after, options.seed)
            form += f", trained for {options.epochs_after}"
            rows.append(Row(name, form, accuracy(shared, data), size))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_options(parser)
    parser.add_argument("--keep", type=float, default=0.5, help="share of MACs (default: 0.5)")
    parser.add_argument("--samples", type=int, default=512, help="calibration images")
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 4, 2], help="of indices")
    parser.add_argument("--epochs-after", type=int, default=0, help="of training of codebooks")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")  # torchao's remarks on its own parts
    data = load(options.data)
    for name in options.nets or NETS:
        model = trained(name, data, options.cache, options.seed, options.epochs)
        rows = measure(name, model, data, options)
        shown = [
            (
                r.net,
                r.form,
                f"{r.accuracy:.2f}",
                f"{r.size / 1e3:.1f}",
                f"{rows[0].size / r.size:.1f}",
            )
            for r in rows
        ]
        headers = ("net", "form", "accuracy %", "kB", "times smaller")
        print(tabulate(shown, headers, disable_numparse=True), "\n", flush=True)


if __name__ == "__main__":
    main()
