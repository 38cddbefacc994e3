"""The options of `optimorph race`, and which of them can be combined."""

import argparse

from optimorph._racing.registry import DEFAULT

USES = {
    "a race": ("task", "optimizers", "steps", "seeds", "lr", "condition", "out"),
    "--sweep": ("task", "optimizers", "steps", "condition", "out"),
    "--list": ("condition",),
    "--redraw": ("out",),
}
"""What the command does → the options that it uses. Every other option is refused."""

DEFAULTS = {
    "task": "text",
    "optimizers": ",".join(DEFAULT),
    "seeds": "1",
    "condition": "1000",
    "out": "race-results",
}


OPTIONS = {
    "task": ("NAME", "what to train: text, digits, flights or quadratic (default: text)"),
    "optimizers": ("A,B", f"optimizers that race, or all (default: {', '.join(DEFAULT)})"),
    "steps": ("N", "training steps (default: the task's)"),
    "seeds": ("N", "training runs of each optimizer (default: 1)"),
    "lr": (
        "NAME=VALUE",
        "peak learning rate of an optimizer, such as adamw=0.005, or of its embeddings, head and norms, such "
        "as adamw.others=0.1 (default: tuned)",
    ),
    "condition": ("R", "condition number of the quadratic (default: 1000)"),
    "out": ("DIR", "folder of the results (default: race-results)"),
}
"""Name → placeholder of the value, help."""

MODES = {
    "sweep": "tune the learning rates over a grid",
    "redraw": "draw plots and reports again from the JSON files in the folder",
    "list": "show tasks, optimizers and learning rates",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `optimorph race`. An option that the user did not type is None."""
    for name, (metavar, text) in OPTIONS.items():
        action = "append" if name == "lr" else "store"
        parser.add_argument(f"--{name}", metavar=metavar, action=action, help=text)
    modes = parser.add_argument_group("instead of a race", "Type at most one of these.")
    for name, text in MODES.items():
        modes.add_argument(f"--{name}", action="store_true", help=text)


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
