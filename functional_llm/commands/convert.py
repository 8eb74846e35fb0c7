"""`convert`: reads a model in one format, writes it in another."""

import argparse
import sys
from pathlib import Path

from functional_llm.commands.command import Command
from functional_llm.commands.merge import is_file
from functional_llm.commands.options import HANDLES, add_precision


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of converting."""
    parser.add_argument("input", metavar="INPUT", help=f"{HANDLES}, KerasHub preset")
    parser.add_argument("output", metavar="OUTPUT", type=Path, help="directory, or file .keras")
    parser.add_argument(
        "--to",
        choices=["directory", "keras", "keras_hub"],
        help="directory in Hugging Face layout, file of stock Keras layers, or preset of KerasHub "
        "(needs keras-hub). By default, what the output's name says",
    )
    add_precision(parser, quantize=False)


def check(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Chooses the format, if it was not given."""
    by_name = "keras" if is_file(arguments.output) else "directory"
    arguments.to = arguments.to or by_name
    if (arguments.to == "keras") != is_file(arguments.output):
        parser.error(f"--to {arguments.to}: expected an output for it, received {arguments.output}")


def run(arguments: argparse.Namespace) -> None:
    """Checks, loads, saves."""
    from functional_llm.files.replacing import check_writable
    from functional_llm.presets import Backbone
    from functional_llm.presets.keras_hub_writing import save_keras_hub_preset
    from functional_llm.presets.sources import adapter_folder, read_numbers

    output = arguments.output
    check_writable(output.parent if is_file(output) else output)
    if adapter_folder(arguments.input) is not None:
        raise ValueError(
            f"Expected a model, received the adapter {arguments.input}. `functional-llm merge "
            f"--adapter {arguments.input} --output {output}` folds it into its base."
        )
    family, _, _ = read_numbers(arguments.input)
    if arguments.to == "keras_hub" and family.keras_hub is None:
        raise ValueError(
            f"Expected a model of a family that KerasHub has. Received: {arguments.input}, "
            f"of the family {family.model_type}."
        )
    backbone = Backbone.from_preset(arguments.input, dtype=arguments.dtype)
    print(f"Writing {output} ...", file=sys.stderr)
    if arguments.to == "keras":
        backbone.save(output)
    elif arguments.to == "directory":
        backbone.save_preset(output)
    else:
        save_keras_hub_preset(backbone, output)
    print(f"Saved in {output}.")


COMMAND = Command(
    description="Reads a model in one format, and writes it in another.",
    add_options=add_options,
    check=check,
    run=run,
)
