"""The options of the command line and their help; imports nothing that takes time."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass

from fxprune.cli import plans, sensitivity

MODELS = """\
MODEL is one of
  torchvision/NAME          a torchvision model with random weights
  package.module:factory    what factory() returns; the current directory can be imported from
  path/to/file.py:factory   the same for a file
  path/to/folder            a model that fxprune saved
"""
_EXAMPLES = """\
examples
  fxprune inspect torchvision/resnet18
  fxprune prune torchvision/resnet18 --flops 50% --out slim
  fxprune verify slim --against torchvision/resnet18
  fxprune bench slim --against torchvision/resnet18
  fxprune plan decoder.py:build --checkpoint model --input 1,8:32000 --params 80% --out plan.json
  fxprune apply plan.json model.safetensors --out slim.safetensors
  fxprune diff plan.json other.json
  fxprune export slim --format pt2,onnx --check
"""
_EXIT_STATUS = """\
exit status
  0  done, and equal where it was checked
  1  the slim model does not equal the masked original
  2  wrong usage, or a model, file or budget that is refused; the message says why
  3  an error inside fxprune
"""


# Name of every criterion that needs no labels, and the class behind it.
CRITERIA = {
    "cpmc": "CPMC",
    "l1": "L1",
    "l2": "L2",
    "lamp": "LAMP",
    "fpgm": "FPGM",
    "bn-scale": "BatchNormScale",
    "random": "Random",
}
FORMATS = ("pt2", "onnx", "torchscript", "aoti", "node-data", "compile")
CALIBRATED = {"apoz": "APoZ", "mean-response": "MeanResponse", "hrank": "HRank"}


def parser() -> argparse.ArgumentParser:
    """The parser of ``fxprune``; the result has the name of the command in ``command``."""
    root = argparse.ArgumentParser(
        prog="fxprune",
        description="Make models smaller by removing channels, exactly.",
        epilog=f"{MODELS}\n{_EXAMPLES}\n{_EXIT_STATUS}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = root.add_subparsers(dest="command", required=True, metavar="COMMAND")

    inspect = _command(commands, "inspect", "show what is coupled, what it costs, what is frozen")
    inspect.add_argument("model", metavar="MODEL")
    _add_model_options(inspect)

    prune = _command(commands, "prune", "remove channels until a budget holds")
    prune.add_argument("model", metavar="MODEL")
    _add_budget_options(prune)
    _add_output_options(prune)
    _add_model_options(prune)

    plan = _command(commands, "plan", "choose channels until a budget holds, and remove nothing")
    plan.add_argument("model", metavar="MODEL")
    _add_budget_options(plan)
    plan.add_argument("--out", metavar="FILE", required=True, help="where to write the plan")
    plan.add_argument("--force", action="store_true", help="replace FILE")
    plan.add_argument(
        "--checkpoint",
        metavar="PATH",
        help="weights to rank by, read tensor by tensor while the model holds none: a .safetensors "
        "file, or a folder with shards and model.safetensors.index.json",
    )
    _add_model_options(plan)

    scan = _command(commands, "sensitivity", "prune each group alone, and measure what it does")
    scan.add_argument("model", metavar="MODEL")
    sensitivity.add_options(scan)
    scan.add_argument("--importance", choices=CRITERIA, metavar="NAME", help=", ".join(CRITERIA))
    _add_model_options(scan)

    verify = _command(commands, "verify", "compare a saved slim model with the masked original")
    verify.add_argument("slim", metavar="SLIM_DIR", help="folder that prune --out wrote")
    verify.add_argument(
        "--against",
        metavar="MODEL",
        required=True,
        help="the original, with the --weights or --seed that it was pruned with",
    )
    _add_model_options(verify)

    bench = _command(commands, "bench", "time a saved slim model beside its original")
    bench.add_argument("slim", metavar="SLIM_DIR", help="folder that prune --out wrote")
    bench.add_argument("--against", metavar="MODEL", required=True, help="the original")
    _add_bench_options(bench)
    _add_model_options(bench)

    apply = _command(commands, "apply", "carry a plan out on a checkpoint, tensor by tensor")
    plans.add_apply_options(apply)
    _add_report_options(apply)

    compose = _command(commands, "compose", "make one plan of several that followed each other")
    plans.add_compose_options(compose)
    _add_model_options(compose)

    diff = _command(commands, "diff", "show what two plans keep differently")
    plans.add_diff_options(diff)
    _add_report_options(diff)

    export = _command(commands, "export", "write a model for other runtimes, and run it there")
    export.add_argument("model", metavar="MODEL", help="usually a folder that prune --out wrote")
    _add_export_options(export)
    _add_model_options(export)
    return root


def _command(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]", name: str, what: str
) -> argparse.ArgumentParser:
    return commands.add_parser(
        name,
        help=what,
        description=f"{what[0].upper()}{what[1:]}.",
        epilog=MODELS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def _add_budget_options(prune: argparse.ArgumentParser) -> None:
    budget = prune.add_argument_group("what to keep")
    share = "share of the {} to keep at most: 0.5 or 50%%"
    budget.add_argument("--flops", metavar="SHARE", help=share.format("MACs"))
    budget.add_argument("--params", metavar="SHARE", help=share.format("parameters"))
    budget.add_argument("--memory", metavar="SHARE", help=share.format("peak activation memory"))
    budget.add_argument(
        "--latency", metavar="SHARE", help=share.format("latency, measured on this device,")
    )
    budget.add_argument(
        "--allocation",
        choices=("global", "uniform", "isomorphic", "greedy", "optimal"),
        help="how budgets are shared out between groups (default: global)",
    )
    budget.add_argument(
        "--scan",
        metavar="FILE",
        help="share budgets out by what fxprune sensitivity --out saved, instead of --allocation",
    )
    budget.add_argument(
        "--importance",
        choices=(*CRITERIA, *CALIBRATED, "reconstruction"),
        metavar="NAME",
        help=f"how channels are ranked: {', '.join(CRITERIA)}; with --calibration also "
        f"{', '.join(CALIBRATED)}, reconstruction (default: cpmc, or reconstruction with "
        "--calibration)",
    )
    budget.add_argument(
        "--calibration",
        metavar="FILE",
        help="samples without labels, to reconstruct the kept weights from: a tensor [samples, "
        "...] or one per input by name, as .npy, .npz, .pt, .pth or .safetensors",
    )
    budget.add_argument(
        "--round-to",
        type=int,
        metavar="N",
        help="make widths multiples of N (default: 1, or with --latency the steps of the device)",
    )
    budget.add_argument(
        "--min-channels", type=int, metavar="N", help="leave every group N channels (default: 1)"
    )
    budget.add_argument(
        "--max-ratio", type=float, metavar="R", help="remove at most this share of any group"
    )
    budget.add_argument(
        "--no-approximate",
        dest="approximate",
        action="store_false",
        help="keep channels that a statistic is taken over, such as those of a layer norm",
    )
    budget.add_argument(
        "--ignore",
        action="append",
        metavar="NAME",
        help="leave a layer, a container or a group as it is; repeatable, * is a wildcard",
    )


def _add_output_options(prune: argparse.ArgumentParser) -> None:
    output = prune.add_argument_group("result")
    output.add_argument("--out", metavar="DIR", help="save the slim model to this folder")
    output.add_argument("--force", action="store_true", help="replace a model saved in DIR")
    output.add_argument(
        "--no-verify", action="store_true", help="do not compare with the masked original"
    )


def _add_bench_options(bench: argparse.ArgumentParser) -> None:
    timing = bench.add_argument_group("what to time")
    timing.add_argument(
        "--runtime",
        action="append",
        choices=("eager", "compile", "onnxruntime"),
        help="as PyTorch runs it, through torch.compile, or exported to ONNX; repeatable "
        "(default: all)",
    )
    timing.add_argument(
        "--rounds", type=int, default=30, metavar="N", help="runs of each model (default: 30)"
    )
    timing.add_argument(
        "--threads", type=int, metavar="N", help="CPU threads of every runtime (default: PyTorch's)"
    )
    timing.add_argument("--device", metavar="DEVICE", help="where to run, e.g. cuda (default: cpu)")


def _add_export_options(export: argparse.ArgumentParser) -> None:
    files = export.add_argument_group("what to write")
    files.add_argument(
        "--format",
        type=_names(FORMATS),
        required=True,
        metavar="NAME,...",
        help=f"of {', '.join(FORMATS)}; compile writes nothing and is checked only",
    )
    files.add_argument(
        "--out", metavar="DIR", default=".", help="folder of the files (default: the current one)"
    )
    files.add_argument("--name", help="of the files, without suffix (default: that of MODEL)")
    files.add_argument("--force", action="store_true", help="replace files")
    files.add_argument(
        "--check",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="run what was written, and compare with the model (default: yes)",
    )
    files.add_argument(
        "--batch",
        choices=("free", "fixed"),
        help="insist on any batch size, or on that of the inputs (default: any, where possible)",
    )


def _add_model_options(command: argparse.ArgumentParser) -> None:
    model = command.add_argument_group("model")
    model.add_argument(
        "--weights", metavar="FILE", help="load a state_dict: .safetensors, .pt or .pth"
    )
    model.add_argument(
        "--input",
        action="append",
        type=_input,
        metavar="SHAPE[:N]",
        help="shape of an example input, e.g. 1,3,224,224, or 1,128:32000 for whole numbers below "
        "32000, such as tokens; repeat it for several inputs (default: the former, for torchvision "
        "models; what was recorded, for saved ones)",
    )
    model.add_argument(
        "--frontend",
        choices=("auto", "symbolic", "export", "eager"),
        default="auto",
        help="how the graph is captured (default: auto)",
    )
    model.add_argument(
        "--head-dims",
        action="store_true",
        help="narrow the heads of attention instead of removing whole ones",
    )
    model.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of random weights and inputs (default: 0)"
    )
    model.add_argument(
        "--trust",
        action="append",
        default=[],
        metavar="PACKAGE",
        help="let a saved model use the code of an installed package; repeatable",
    )
    _add_report_options(command)


def _add_report_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--json", action="store_true", help="print JSON instead of tables")
    command.add_argument("-v", "--verbose", action="store_true", help="show tracebacks of errors")


def _names(known: tuple[str, ...]) -> Callable[[str], list[str]]:
    def names(text: str) -> list[str]:
        found = text.split(",")
        if not set(found) <= set(known):
            raise argparse.ArgumentTypeError(f"{text!r}: choose from {', '.join(known)}")
        return list(dict.fromkeys(found))

    return names


@dataclass(frozen=True, slots=True)
class RandomInput:
    """A random example input: normally distributed, or whole numbers below ``count``."""

    shape: tuple[int, ...]
    count: int | None = None


def _input(text: str) -> RandomInput:
    shape, colon, count = text.partition(":")
    try:
        found = RandomInput(
            tuple(int(part) for part in shape.split(",")), int(count) if colon else None
        )
    except ValueError:
        found = RandomInput((0,))
    if min(*found.shape, 1 if found.count is None else found.count) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a shape such as 1,3,224,224 or 1,8:100")
    return found
