"""What a command is, and how one is run: mistakes get a line that says what is wrong."""

import sys
import time
import warnings
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from dataclasses import dataclass

STARTED = time.perf_counter()


def _accept(parser: ArgumentParser, arguments: Namespace) -> None:
    """Finds nothing wrong."""


@dataclass(frozen=True, kw_only=True)
class Command:
    """A command of the program.

    Args:
        description: What it does, for `--help`.
        add_options: Adds its options to a parser.
        run: Does it.
        check: Ends the program by `parser.error` at options that do not go together; may complete
            others.
        interrupted: Exit code after Ctrl-C.
        advice: What to say after Ctrl-C.
    """

    description: str
    add_options: Callable[[ArgumentParser], None]
    run: Callable[[Namespace], None]
    check: Callable[[ArgumentParser, Namespace], None] = _accept
    interrupted: int = 130
    advice: str = ""

    def main(self, program: str, options: list[str]) -> int:
        """Parses options and runs; returns the exit code, 2 after a line that says what is wrong.

        Args:
            program: What the messages begin with.
            options: The command line behind it.
        """
        parser = ArgumentParser(program, f"{program} [options]", self.description)
        self.add_options(parser)
        arguments = parser.parse_args(options)
        self.check(parser, arguments)

        def say(message: Warning | str, *place: object) -> None:
            print(f"{program}: {message}", file=sys.stderr)

        try:
            with warnings.catch_warnings():
                warnings.showwarning = say  # type: ignore[assignment]
                self.run(arguments)
        except (ValueError, OSError, RuntimeError, ImportError) as error:
            notes = getattr(error, "__notes__", ())
            print(f"{program}: {error}", *notes, sep="\n", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            if self.advice:
                print(f"\n{program}: {self.advice}", file=sys.stderr)
            else:
                print()
            return self.interrupted
        return 0


def first_line(error: Exception) -> str:
    """Returns what an error says, in one line."""
    return f"{type(error).__name__}: {error}".strip().partition("\n")[0]
