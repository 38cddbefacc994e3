"""The `optimorph` command."""

import argparse
import sys
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong and where help is."""
        self.exit(2, f"{self.prog}: {message}. See {self.prog} --help.\n")


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and run the command; returns the exit code."""
    parser = Parser(prog="optimorph", description="Optimizers for JAX that read like the mathematics.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    racing = commands.add_parser("race", help="train a real model with several optimizers and see who wins")
    try:
        from optimorph.race import command
    except KeyboardInterrupt:
        return _interrupted()
    except ModuleNotFoundError as error:
        if error.name and error.name.startswith("optimorph"):
            raise
        parser.exit(2, f"optimorph race needs {error.name}: pip install 'optimorph[race]'\n")
    command.add_arguments(racing)
    given = parser.parse_args(arguments)
    try:
        return command.main(given)
    except KeyboardInterrupt:
        return _interrupted()
    except command.BadInput as error:
        racing.exit(2, f"optimorph race: {error}.\n")


def _interrupted() -> int:
    print("Interrupted.", file=sys.stderr)
    return 130


if __name__ == "__main__":
    sys.exit(main())
