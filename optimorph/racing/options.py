"""What `optimorph race` understands, and which of its options belong together."""

import argparse

from optimorph.racing.contestants import MAKERS

USES = {
    "a race": ("task", "optimizers", "steps", "seeds", "lr", "condition", "out"),
    "--sweep": ("task", "optimizers", "steps", "condition", "out"),
    "--list": ("condition",),
    "--redraw": ("out",),
}
"""What can be done → the options that it uses; another one is refused, never ignored."""

DEFAULTS = {
    "task": "text",
    "optimizers": ",".join(MAKERS),
    "seeds": "1",
    "condition": "1000",
    "out": "race-results",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `optimorph race`; None where nothing was typed."""
    parser.add_argument("--task", metavar="NAME", help="text, digits, quadratic (default: text)")
    parser.add_argument("--optimizers", metavar="A,B", help="who races (default: all)")
    parser.add_argument("--steps", metavar="N", help="training steps (default: the task's)")
    parser.add_argument("--seeds", metavar="N", help="runs of each optimizer (default: 1)")
    parser.add_argument(
        "--lr",
        metavar="NAME=VALUE",
        action="append",
        help="a peak learning rate, such as adamw=0.005; adamw.others and muon.others are those of "
        "embeddings, head and norms (default: tuned)",
    )
    parser.add_argument("--condition", metavar="R", help="condition number of the quadratic (default: 1000)")
    parser.add_argument("--out", metavar="DIR", help="results (default: race-results)")
    instead = parser.add_argument_group("instead of a race", "One of these at a time.")
    instead.add_argument("--sweep", action="store_true", help="tune the learning rates, over a grid")
    instead.add_argument(
        "--redraw", action="store_true", help="draw pictures and pages again, from the folder's JSON files"
    )
    instead.add_argument("--list", action="store_true", help="show tasks, optimizers, learning rates")


def clash(given: argparse.Namespace) -> str | None:
    """What was typed and would be ignored, and what to type instead; None if nothing is."""
    asked = [name for name in USES if getattr(given, name.lstrip("-"), False)] or ["a race"]
    if len(asked) > 1:
        return f"{' and '.join(asked)} do not go together; type one of them"
    for name in USES["a race"]:
        if getattr(given, name) is not None and name not in USES[asked[0]]:
            return f"--{name} has no effect with {asked[0]}; leave out one of them"
    if given.condition is not None and not given.list and given.task != "quadratic":
        return "--condition is that of the quadratic; type --task quadratic, or leave out --condition"
    return None


def fill(given: argparse.Namespace) -> None:
    """The defaults of what was not typed."""
    for name, default in DEFAULTS.items():
        if getattr(given, name) is None:
            setattr(given, name, default)
    given.lr = given.lr or []
