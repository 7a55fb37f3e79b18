"""``fxprune apply|compose|diff``: what is done with plans that are there already."""

import argparse

OTHER_WEIGHTS = ("warn", "allow", "refuse")
_PLAN = "plan file, or folder of a saved model"


def add_apply_options(command: argparse.ArgumentParser) -> None:
    """A plan, a checkpoint, and where the slim one goes."""
    command.add_argument("plan", metavar="PLAN", help=_PLAN)
    command.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        help=".safetensors file, or folder with shards and model.safetensors.index.json",
    )
    command.add_argument(
        "--out", metavar="PATH", required=True, help="file or folder of the slim checkpoint"
    )
    command.add_argument(
        "--other-weights",
        choices=OTHER_WEIGHTS,
        default="warn",
        help="what to do if the plan was made by other weights (default: warn)",
    )


def add_compose_options(command: argparse.ArgumentParser) -> None:
    """The original, and plans that followed each other."""
    command.add_argument("model", metavar="MODEL", help="the original, see below")
    command.add_argument(
        "plans", metavar="PLAN", nargs="+", help=f"{_PLAN}; in the order of their use"
    )
    command.add_argument("--out", metavar="FILE", required=True, help="where to write the plan")


def add_diff_options(command: argparse.ArgumentParser) -> None:
    """Two plans."""
    command.add_argument("first", metavar="PLAN", help=_PLAN)
    command.add_argument("second", metavar="PLAN", help=_PLAN)
