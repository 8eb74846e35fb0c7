"""`score`: how probable a model finds what is in a file."""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from functional_llm.commands.command import Command
from functional_llm.commands.loading import Model
from functional_llm.commands.options import (
    add_adapters,
    add_mesh,
    add_precision,
    add_preset,
    check_model,
    filled,
    positive,
)
from functional_llm.commands.processes import join

if TYPE_CHECKING:
    from functional_llm.evaluation.tasks import Evaluation

_SHOWN = 10  # records whose log-probabilities are printed


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of scoring."""
    add = parser.add_argument
    add_preset(parser)
    add_adapters(parser)
    add_precision(parser)
    add_mesh(parser)
    add(
        *("--data", "--dataset"),
        dest="data",
        metavar="FILE",
        required=True,
        help=".jsonl, .json, .csv or .parquet with the columns context and continuation; or "
        "question, choices and answer; or text. Or a .txt file",
    )
    add("--output", type=Path, help="file .jsonl for the numbers of each record")
    question = parser.add_mutually_exclusive_group()
    question.add_argument(
        "--template", type=filled, help="what a question is asked with (Question: {question})"
    )
    question.add_argument("--chat", action="store_true", help="ask questions as a user")
    add("--batch-size", type=positive, help="rows at once (as many as keep the processor busy)")
    add("--window", type=positive, help="tokens that the model reads of a long text (its context)")
    add("--stride", type=positive, help="new tokens of a window (all)")


def run(arguments: argparse.Namespace) -> None:
    """Reads, loads, scores, writes, prints."""
    join(arguments)
    # First what needs no model: it may be wrong.
    from functional_llm.files.replacing import check_writable
    from functional_llm.training.record_sources import read_records

    output = arguments.output
    records = read_records(arguments.data)
    if output is not None:
        check_writable(output.parent)
    from functional_llm.evaluation.tasks import TEMPLATE, evaluate_records

    model = Model(arguments)
    tokenizer = model.load_tokenizer()
    template = None if arguments.chat else arguments.template or TEMPLATE
    sizes = arguments.batch_size, arguments.window, arguments.stride
    found = evaluate_records(model.load(), records, tokenizer, template, *sizes)
    if output is not None:
        write_records(found, output)
    print_evaluation(found)
    if output is not None:
        print(f"Numbers of each record: {output}", file=sys.stderr)


def write_records(found: "Evaluation", path: Path) -> None:
    """Writes the numbers of each record, a line each; the file is replaced when it is complete."""
    from functional_llm.files.replacing import replaced_file

    with replaced_file(path) as part, part.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(x, ensure_ascii=False) + "\n" for x in found.records)


def print_evaluation(found: "Evaluation") -> None:
    """Prints the first records' log-probabilities, and the numbers over all."""
    for i, record in enumerate(found.records[:_SHOWN]):
        print(f"{i + 1:>6}  {_describe(record)}")
    if len(found.records) > _SHOWN:
        print(f"        and {len(found.records) - _SHOWN} more records")
    for name, number in found.summary.items():
        print(f"{name:>16}  {number:.4f}")


def _describe(record: dict[str, object]) -> str:
    logs = record.get("log_probabilities")
    if isinstance(logs, list):
        numbers = "  ".join(f"{x:.2f}" for x in logs)
        return f"{numbers}  chosen {record['chosen']}, right {record['right']}"
    text = record.get("continuation", record.get("text"))
    return f"{record['log_probability']:10.3f}  {text!r:.60}"


COMMAND = Command(
    description="Scores the records of a file: log-probabilities of continuations, accuracy on "
    "questions with choices, perplexity of texts.",
    add_options=add_options,
    check=check_model,
    run=run,
)
