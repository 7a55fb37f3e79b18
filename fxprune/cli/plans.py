"""``fxprune apply|compose|diff``: what is done with plans that are there already."""

import argparse

OTHER_WEIGHTS = ("warn", "allow", "refuse")


def add_options(name: str, command: argparse.ArgumentParser) -> None:
    """The options of one of the commands; imports nothing that takes time."""
    plan = "plan file, or folder of a saved model"
    if name == "diff":
        command.add_argument("first", metavar="PLAN", help=plan)
        command.add_argument("second", metavar="PLAN", help=plan)
        return
    if name == "compose":
        command.add_argument("model", metavar="MODEL", help="the original, see below")
        command.add_argument(
            "plans", metavar="PLAN", nargs="+", help=f"{plan}; in the order of their use"
        )
        command.add_argument("--out", metavar="FILE", required=True, help="where to write the plan")
        return
    command.add_argument("plan", metavar="PLAN", help=plan)
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
