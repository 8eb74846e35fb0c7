"""`merge`: folds adapters into their base."""

import argparse
import sys
from pathlib import Path
from typing import Any

from functional_llm.commands.command import Command
from functional_llm.commands.loading import Model
from functional_llm.commands.options import (
    HANDLES,
    add_adapters,
    add_precision,
    check_adapters,
)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of merging."""
    add_adapters(parser, required=True)
    parser.add_argument("--preset", metavar="MODEL", help=f"the base: {HANDLES}")
    output = "directory that Transformers loads; or a file .keras, which plain Keras loads"
    parser.add_argument("--output", type=Path, required=True, help=output)
    add_precision(parser, quantize=False)


def run(arguments: argparse.Namespace) -> None:
    """Checks, loads, merges, saves."""
    from functional_llm import peft
    from functional_llm.files.replacing import check_writable
    from functional_llm.presets.sources import read_numbers

    check_writable(arguments.output.parent if is_file(arguments.output) else arguments.output)
    model = Model(arguments)
    if quantized := read_numbers(model.base)[2].quantized:
        modes = " and ".join(sorted(set(quantized.values())))
        raise ValueError(
            f"Expected a base of floats to merge into. Received: {model.base}, {len(quantized)} "
            f"layers of which hold {modes}, in which small changes are lost. Give the model that "
            "it was quantised from: --preset."
        )
    tokenizer = model.load_tokenizer()
    merged = peft.merge(model.load(), keep=False)
    print(f"Writing {arguments.output} ...", file=sys.stderr)
    if is_file(arguments.output):
        merged.save(arguments.output, tokenizer=tokenizer)
    else:
        merged.save_preset(arguments.output, tokenizer, facts=_facts(model.adapters))
    print(f"Saved in {arguments.output}. Try it: functional-llm chat --preset {arguments.output}")


def _facts(adapters: "dict[Path, float]") -> Any:
    from functional_llm.formats.model_card import CardFacts

    shares = " and ".join(f"{weight:g} of {folder.name}" for folder, weight in adapters.items())
    return CardFacts(method=f"`functional-llm merge`: the base, with adapters folded in: {shares}.")


def is_file(output: Path) -> bool:
    """Whether an output is a file of stock Keras; else it is a directory."""
    return output.suffix == ".keras"


COMMAND = Command(
    description="Folds adapters, each with its weight, into their base, and saves the result.",
    add_options=add_options,
    check=check_adapters,
    run=run,
)
