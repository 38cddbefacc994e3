"""The `optimorph` command."""

import argparse
import importlib
import os
import shutil
import sys
import textwrap
from importlib.metadata import version
from typing import NoReturn

COMMANDS = {
    "race": ("optimorph._racing.command", "train a model with several optimizers and compare them"),
    "plan": ("optimorph._plan_command", "show what Muon will do with every parameter of a model"),
}
"""Name → (module with `add_arguments`, `main` and `BadInput`; help)."""


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong and where help is."""
        self.fail(f"{self.prog}: {message}. See {self.prog} --help.")

    def fail(self, message: str) -> NoReturn:
        """Print the message and exit with code 2. On a terminal, lines break between words."""
        if sys.stderr.isatty():
            columns = shutil.get_terminal_size().columns
            message = textwrap.fill(message, columns, break_long_words=False, break_on_hyphens=False)
        self.exit(2, f"{message}\n")


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and run the command; returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = Parser(prog="optimorph", description="Optimizers for JAX, from gradient descent to Muon.")
    parser.add_argument("--version", action="version", version=f"optimorph {version('optimorph')}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    parsers = {name: commands.add_parser(name, help=about) for name, (_, about) in COMMANDS.items()}
    chosen = next((name for name in arguments if name in COMMANDS), None)
    try:
        if chosen is None:
            parser.parse_args(arguments)  # help, or an error
            return 2
        command = importlib.import_module(COMMANDS[chosen][0])
    except KeyboardInterrupt:
        return _interrupted()
    except ModuleNotFoundError as error:
        if error.name and error.name.startswith("optimorph"):
            raise
        parser.fail(f"optimorph {chosen} needs {error.name}: pip install 'optimorph[{chosen}]'")
    command.add_arguments(parsers[chosen])
    given = parser.parse_args(arguments)
    try:
        code = command.main(given)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return _interrupted()
    except BrokenPipeError:  # the reader, such as head, has seen enough
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        return 0
    except command.BadInput as error:
        parsers[chosen].fail(f"optimorph {chosen}: {error}.")


def _interrupted() -> int:
    print("Interrupted.", file=sys.stderr)
    return 130


if __name__ == "__main__":
    sys.exit(main())
