"""The program `functional-llm`, also `python -m functional_llm`: one command of the list."""

import importlib
import sys
from argparse import REMAINDER, ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Sequence
from importlib import metadata

from functional_llm.commands.command import Command

# A command is a module of this name beside, with a `COMMAND` in it.
COMMANDS = {
    "generate": "write text",
    "chat": "talk with a model in the terminal",
    "finetune": "train an adapter, or all weights, on a dataset",
    "merge": "fold adapters into their base: a directory that Transformers loads",
    "convert": "read one format, write another",
    "push": "upload a model or an adapter to the Hugging Face Hub",
    "score": "log-probabilities, accuracy and perplexity on a file",
    "info": "sizes, formats, memory and attention of a model",
}


def main(arguments: Sequence[str] | None = None, program: str = "functional-llm") -> int:
    """Runs the command that the command line names; returns its exit code.

    Args:
        arguments: The command line; that of the process unless given.
        program: What the messages begin with.
    """
    lines = "\n".join(f"  {name:10}{summary}" for name, summary in COMMANDS.items())
    parser = ArgumentParser(
        program,
        f"{program} COMMAND [options]",
        "Language models as editable graphs.",
        f"commands:\n{lines}\n\n`{program} COMMAND --help` lists the options of one.",
        formatter_class=RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=_version())
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="one of those below")
    parser.add_argument("options", nargs=REMAINDER, help="of the command")
    given = parser.parse_args(arguments)
    return run_command(given.command, f"{program} {given.command}", given.options)


def run_command(name: str, program: str, options: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code.

    Args:
        name: Of `COMMANDS`.
        program: What the messages begin with.
        options: The command line behind it; that of the process unless given.
    """
    command: Command = importlib.import_module(f"functional_llm.commands.{name}").COMMAND
    return command.main(program, list(sys.argv[1:] if options is None else options))


def _version() -> str:
    try:
        return metadata.version("functional-llm")
    except metadata.PackageNotFoundError:
        return "a checkout that is not installed"
