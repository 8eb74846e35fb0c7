"""What a command is, and how one is run: mistakes get a line that says what is wrong."""

import os
import sys
import time
import traceback
import warnings
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from dataclasses import dataclass

from functional_llm.commands.processes import launch
from functional_llm.files.processes import place_among_processes

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
        number = getattr(arguments, "processes", None)
        if isinstance(number, int):
            return launch(self.run.__module__.rpartition(".")[2], options, number)

        def say(message: Warning | str, *place: object) -> None:
            print(f"{program}: {message}", file=sys.stderr)

        error: BaseException | None = None
        try:
            with warnings.catch_warnings():
                warnings.showwarning = say  # type: ignore[assignment]
                self.run(arguments)
        except (ValueError, OSError, RuntimeError, ImportError) as mistake:
            error = mistake
            notes = getattr(error, "__notes__", ())
            print(f"{program}: {error}", *notes, sep="\n", file=sys.stderr)
            return 2
        except KeyboardInterrupt as interrupt:
            error = interrupt
            if self.advice:
                print(f"\n{program}: {self.advice}", file=sys.stderr)
            else:
                print()
            return self.interrupted
        except BaseException as fault:
            error = fault
            if place_among_processes()[1] > 1:
                traceback.print_exc()
            raise
        finally:
            if place_among_processes()[1] > 1:
                _leave(error)
        return 0


def _leave(error: BaseException | None) -> None:
    """Tells other processes that this one ends; after an error it does not wait for them."""
    from functional_llm.training.processes import ENDED, end_run

    end_run(first_line(error) if error else "")
    if error is not None:
        if type(error).__name__ == "JaxRuntimeError":  # as of a collective without a partner
            print("Another process may have ended first: see what it says.", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(ENDED)


def first_line(error: BaseException) -> str:
    """Returns what an error says, in one line."""
    return f"{type(error).__name__}: {error}".strip().partition("\n")[0]
