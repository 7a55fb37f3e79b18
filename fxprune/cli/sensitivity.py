"""``fxprune sensitivity``: its options, and what it does with them."""

import argparse
import contextlib
from collections.abc import Iterator
from typing import Any

ENGINES = ("processes", "dask", "ray")


def add_options(command: argparse.ArgumentParser) -> None:
    """The options of the command; imports nothing that takes time."""
    scan = command.add_argument_group("scan")
    scan.add_argument(
        "--data",
        metavar="FILE",
        required=True,
        help="samples [n, ...] (inputs by name if there are several) and their targets [n], named "
        "targets, as .npz, .pt, .pth or .safetensors",
    )
    scan.add_argument(
        "--metric",
        choices=("accuracy", "cross-entropy", "mse"),
        default="accuracy",
        help="what is measured on the data (default: accuracy)",
    )
    scan.add_argument(
        "--ratios",
        type=_ratios,
        metavar="R,R,...",
        help="shares of its channels that a group loses (default: 0.1,0.2,...,0.9)",
    )
    scan.add_argument(
        "--stop-at",
        type=float,
        metavar="D",
        help="leave out larger ratios of a group once the damage is more than this",
    )
    scan.add_argument(
        "--ignore", action="append", default=[], metavar="NAME", help="layers not to scan"
    )
    scan.add_argument(
        "--results",
        metavar="FILE",
        help="append results to this file as they come, and take up what it holds",
    )
    scan.add_argument("--out", metavar="FILE", help="save the scan, for prune --scan")
    scan.add_argument("--plot", metavar="PNG", help="draw the curves")
    where = command.add_argument_group("where evaluations run")
    where.add_argument("--jobs", type=int, metavar="N", help="how many at a time (default: all)")
    where.add_argument(
        "--threads", type=int, default=1, metavar="N", help="threads of each (default: 1)"
    )
    where.add_argument(
        "--backend",
        choices=ENGINES,
        default="processes",
        help="processes of this machine, or a cluster (default: processes)",
    )
    where.add_argument(
        "--address", metavar="ADDRESS", help="of the scheduler; without it, one is started here"
    )


def scanned(deps: Any, criterion: Any, options: argparse.Namespace) -> tuple[bool, str]:
    """Scan, save what was asked for, and report."""
    from torch.nn import functional as F

    import fxprune as fp
    from fxprune.cli.calibration import read_calibration

    batches = [_pair(batch, options.data) for batch in read_calibration(options.data, "--data")]
    metrics = {"cross-entropy": F.cross_entropy, "mse": F.mse_loss}
    chosen: Any = {"metric": metrics[options.metric]} if options.metric in metrics else {}
    given: Any = {"ratios": options.ratios} if options.ratios else {}
    with _engine(options.backend, options.address):
        found = fp.sensitivity(
            deps,
            fp.Evaluation(batches, **chosen),
            criterion=criterion,
            higher_is_better=options.metric == "accuracy",
            stop_at=options.stop_at,
            ignore=options.ignore,
            file=options.results,
            n_jobs=options.jobs,
            threads=options.threads,
            **given,
        )
    if options.out is not None:
        found.save(options.out)
    if options.plot is not None:
        found.plot(options.plot)
    return True, found.to_json().rstrip() if options.json else found.report()


def _pair(batch: Any, file: str) -> tuple[Any, Any]:
    from fxprune.errors import ArtifactError

    if not isinstance(batch, dict) or "targets" not in batch:
        raise ArtifactError(f"--data {file} holds no tensor named targets beside the samples")
    targets = batch.pop("targets")
    return (next(iter(batch.values())) if len(batch) == 1 else batch), targets


@contextlib.contextmanager
def _engine(name: str, address: str | None) -> Iterator[None]:
    """Inside, joblib's tasks run where the user said."""
    import joblib

    from fxprune.errors import ArgumentError

    if name == "processes":
        if address is not None:
            raise ArgumentError("--address needs --backend dask or ray")
        yield
        return
    try:
        if name == "dask":
            from distributed import Client

            with Client(address), joblib.parallel_config("dask"):
                yield
        else:
            import ray
            from ray.util.joblib import register_ray

            ray.init(address=address)
            register_ray()
            with joblib.parallel_config("ray"):
                yield
            ray.shutdown()
    except ImportError as error:
        raise ArgumentError(
            f"--backend {name} needs a package: pip install 'fxprune[cluster]' ({error})"
        ) from error
    except (OSError, ConnectionError, TimeoutError) as error:
        raise ArgumentError(f"no {name} scheduler at {address}: {error}") from error


def _ratios(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list such as 0.25,0.5,0.75") from None
