"""The options of `optimorph race`, and which of them can be combined."""

import argparse

from optimorph._racing.registry import OPTIMIZERS

USES = {
    "a race": ("task", "optimizers", "steps", "seeds", "lr", "condition", "out"),
    "--sweep": ("task", "optimizers", "steps", "condition", "out"),
    "--list": ("condition",),
    "--redraw": ("out",),
}
"""What the command does → the options that it uses. Every other option is refused."""

DEFAULTS = {
    "task": "text",
    "optimizers": ",".join(OPTIMIZERS),
    "seeds": "1",
    "condition": "1000",
    "out": "race-results",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `optimorph race`. An option that the user did not type is None."""
    parser.add_argument(
        "--task", metavar="NAME", help="what to train: text, digits or quadratic (default: text)"
    )
    parser.add_argument("--optimizers", metavar="A,B", help="optimizers that race (default: all)")
    parser.add_argument("--steps", metavar="N", help="training steps (default: the task's)")
    parser.add_argument("--seeds", metavar="N", help="training runs of each optimizer (default: 1)")
    parser.add_argument(
        "--lr",
        metavar="NAME=VALUE",
        action="append",
        help="peak learning rate of an optimizer, such as adamw=0.005; adamw.others and muon.others set "
        "that of embeddings, head and norms (default: tuned)",
    )
    parser.add_argument("--condition", metavar="R", help="condition number of the quadratic (default: 1000)")
    parser.add_argument("--out", metavar="DIR", help="folder of the results (default: race-results)")
    modes = parser.add_argument_group("instead of a race", "Type at most one of these.")
    modes.add_argument("--sweep", action="store_true", help="tune the learning rates over a grid")
    modes.add_argument(
        "--redraw",
        action="store_true",
        help="draw plots and reports again from the JSON files in the folder",
    )
    modes.add_argument("--list", action="store_true", help="show tasks, optimizers and learning rates")


def find_conflict(args: argparse.Namespace) -> str | None:
    """Which options cannot be combined, and what to type instead; None if there is no conflict."""
    modes = [mode for mode in USES if getattr(args, mode.lstrip("-"), False)] or ["a race"]
    if len(modes) > 1:
        return f"{' and '.join(modes)} cannot be combined; type only one of them"
    for name in USES["a race"]:
        if getattr(args, name) is not None and name not in USES[modes[0]]:
            return f"--{name} has no effect with {modes[0]}; leave out one of them"
    if args.condition is not None and not args.list and args.task != "quadratic":
        return "--condition applies only to the quadratic; type --task quadratic, or leave out --condition"
    return None


def fill_defaults(args: argparse.Namespace) -> None:
    """Set every option that the user did not type to its default."""
    for name, default in DEFAULTS.items():
        if getattr(args, name) is None:
            setattr(args, name, default)
    args.lr = args.lr or []
