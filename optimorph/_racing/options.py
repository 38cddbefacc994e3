"""The options of `optimorph race`, and which of them can be combined."""

import argparse

from optimorph._racing.registry import DEFAULT

RACE, SWEEP, REDRAW, LIST = "", "sweep", "redraw", "list"

OPTIONS = {
    "task": ("NAME", "what to train: text, digits, flights or quadratic", "text", (RACE, SWEEP)),
    "optimizers": ("A,B", "optimizers that race, or all", ",".join(DEFAULT), (RACE, SWEEP)),
    "steps": ("N", "training steps (default: the task's)", None, (RACE, SWEEP)),
    "seeds": ("N", "training runs of each optimizer", "1", (RACE,)),
    "lr": (
        "NAME=VALUE",
        "peak learning rate of an optimizer, such as adamw=0.005, or of its embeddings, head and norms, such "
        "as adamw.others=0.1 (default: tuned)",
        None,
        (RACE,),
    ),
    "condition": ("R", "condition number of the quadratic", "1000", (RACE, SWEEP, LIST)),
    "out": ("DIR", "folder of the results", "race-results", (RACE, SWEEP, REDRAW)),
}
"""Name → placeholder of the value, help, default, and which modes use it. The other modes refuse it."""

MODES = {
    SWEEP: "tune the learning rates over a grid",
    REDRAW: "draw plots and reports again from the JSON files in the folder",
    LIST: "show tasks, optimizers and learning rates",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `optimorph race`. An option that the user did not type is None."""
    for name, (metavar, text, default, _) in OPTIONS.items():
        action = "append" if name == "lr" else "store"
        about = text if default is None else f"{text} (default: {default})"
        parser.add_argument(f"--{name}", metavar=metavar, action=action, help=about)
    group = parser.add_argument_group("instead of a race", "Type at most one of these.")
    modes = group.add_mutually_exclusive_group()
    for name, text in MODES.items():
        modes.add_argument(
            f"--{name}", dest="mode", action="store_const", const=name, default=RACE, help=text
        )


def find_conflict(args: argparse.Namespace) -> str | None:
    """Which options cannot be combined, and what to type instead; None if there is no conflict."""
    for name, (*_, modes) in OPTIONS.items():
        if getattr(args, name) is not None and args.mode not in modes:
            return f"--{name} has no effect with --{args.mode}; leave out one of them"
    if args.condition is not None and args.mode != LIST and args.task != "quadratic":
        return "--condition applies only to the quadratic; type --task quadratic, or leave out --condition"
    return None


def fill_defaults(args: argparse.Namespace) -> None:
    for name, (_, _, default, _) in OPTIONS.items():
        if getattr(args, name) is None:
            setattr(args, name, default)
    args.lr = args.lr or []
