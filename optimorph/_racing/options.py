"""The options of `optimorph race`, and which of them can be combined."""

import argparse

from optimorph._racing.contestants import MAKERS

USES = {
    "a race": ("task", "optimizers", "steps", "seeds", "lr", "condition", "out"),
    "--sweep": ("task", "optimizers", "steps", "condition", "out"),
    "--list": ("condition",),
    "--redraw": ("out",),
}
"""What the command does → the options it uses. Any other option is refused, never ignored."""

DEFAULTS = {
    "task": "text",
    "optimizers": ",".join(MAKERS),
    "seeds": "1",
    "condition": "1000",
    "out": "race-results",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `optimorph race`. An option that was not typed is None."""
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
    instead = parser.add_argument_group("instead of a race", "Type at most one of these.")
    instead.add_argument("--sweep", action="store_true", help="tune the learning rates over a grid")
    instead.add_argument(
        "--redraw",
        action="store_true",
        help="draw pictures and pages again from the JSON files in the folder",
    )
    instead.add_argument("--list", action="store_true", help="show tasks, optimizers and learning rates")


def clash(given: argparse.Namespace) -> str | None:
    """Which options cannot be combined, and what to type instead; None if all can."""
    asked = [name for name in USES if getattr(given, name.lstrip("-"), False)] or ["a race"]
    if len(asked) > 1:
        return f"{' and '.join(asked)} cannot be combined; type only one of them"
    for name in USES["a race"]:
        if getattr(given, name) is not None and name not in USES[asked[0]]:
            return f"--{name} has no effect with {asked[0]}; leave out one of them"
    if given.condition is not None and not given.list and given.task != "quadratic":
        return "--condition applies only to the quadratic; type --task quadratic, or leave out --condition"
    return None


def fill(given: argparse.Namespace) -> None:
    """Set every option that was not typed to its default."""
    for name, default in DEFAULTS.items():
        if getattr(given, name) is None:
            setattr(given, name, default)
    given.lr = given.lr or []
