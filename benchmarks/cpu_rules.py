"""Measures each rule of the CPU rewriter: the library with all rules, and without one of them.

Both run in processes of their own, in turns, with random weights in SmolLM2-135M's sizes. Prints
what the processor can do, and a table: with all rules, without the one, and the ratio, the median
of the rounds, each compared with itself. Below 1 the rule loses.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import median

from functional_llm.xla import rewriter
from functional_llm.xla.processor import read_processor

REPOSITORY = Path(__file__).resolve().parents[1]
NO_RULE = "none"  # is left out
ALL_RULES = "all"  # are left out
GENERATION = ("decode_1", "decode_8", "decode_32", "prefill_32", "prefill_512")
TRAINING = "lora_step"
EXAMPLES = """examples:
  python -m benchmarks.cpu_rules --rules int8_as_half --precisions int8 --measures decode_8
  python -m benchmarks.cpu_rules --rules all --rounds 5
"""


def parse_arguments() -> argparse.Namespace:
    names = [ALL_RULES, *(rule.name for rule in rewriter.RULES)]
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cpu_rules",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--rules",
        nargs="+",
        choices=names,
        default=names,
        metavar="RULE",
        help=f"what is left out in turn; `all`: every rule at once ({', '.join(names)})",
    )
    add(
        "--precisions",
        nargs="+",
        default=["float32", "bfloat16", "int8"],
        metavar="PRECISION",
        help="of the weights (float32 bfloat16 int8)",
    )
    add(
        "--measures",
        nargs="+",
        choices=[*GENERATION, TRAINING],
        default=[*GENERATION, TRAINING],
        metavar="MEASURE",
        help=f"what is measured ({', '.join([*GENERATION, TRAINING])})",
    )
    add("--rounds", type=int, default=3, help="turns, after one to warm up (3)")
    add("--layers", type=int, default=30, help="decoder layers of the model (30)")
    add("--worker", nargs=3, help=argparse.SUPPRESS)  # rule left out, precision, work
    arguments = parser.parse_args()
    if arguments.rounds < 1 or arguments.layers < 1:
        parser.error("--rounds, --layers: expected at least 1")
    return arguments


def main() -> int:
    arguments = parse_arguments()
    if arguments.worker:
        answer_requests(*arguments.worker, arguments.layers)
        return 0
    processor = read_processor()
    flags = [name for name in ("bfloat16", "amx", "vnni") if getattr(processor, name)]
    print(f"{processor.name}, {len(os.sched_getaffinity(0))} cores; {', '.join(flags) or 'none'}\n")
    print("| left out | precision | measure | with all rules | without | ratio |")
    print("|---|---|---|---:|---:|---:|", flush=True)
    for precision in arguments.precisions:
        for line in compare(precision, arguments):
            print(line, flush=True)
    return 0


def compare(precision: str, arguments: argparse.Namespace) -> Iterator[str]:
    """Yields rows of the table: each rule and each measure, tokens/s."""
    generation = [name for name in arguments.measures if name != TRAINING]
    training = [TRAINING] if TRAINING in arguments.measures and precision != "int8" else []
    for work, measures in (("generate", generation), ("lora", training)):
        if not measures:
            continue
        with RuleWorker(NO_RULE, precision, work, arguments.layers) as complete:
            for rule in arguments.rules:
                with RuleWorker(rule, precision, work, arguments.layers) as without:
                    for measure in measures:
                        yield row(rule, precision, measure, complete, without, arguments.rounds)


def row(
    rule: str,
    precision: str,
    measure: str,
    complete: "RuleWorker",
    without: "RuleWorker",
    rounds: int,
) -> str:
    """Returns a row of the table."""
    pairs = [(complete.ask(measure, i), without.ask(measure, i)) for i in range(rounds + 1)][1:]
    with_all, left_out = (median(values) for values in zip(*pairs, strict=True))
    ratio = median(a / b for a, b in pairs)
    return f"| {rule} | {precision} | {measure} | {with_all:.4g} | {left_out:.4g} | {ratio:.2f} |"


class RuleWorker:
    """A process of the library without one rule.

    Args:
        rule: Name of the rule, or `NO_RULE`, or `ALL_RULES`.
        precision: Of the weights.
        work: "generate" or "lora".
        layers: Decoder layers of the model.
    """

    def __init__(self, rule: str, precision: str, work: str, layers: int) -> None:
        command = ["-m", "benchmarks.cpu_rules", "--layers", str(layers), "--worker", rule]
        self._process = subprocess.Popen(
            [sys.executable, *command, precision, work],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=REPOSITORY,
        )

    def ask(self, measure: str, round_number: int) -> float:
        """Lets the worker measure, and waits for it."""
        reader, writer = self._process.stdout, self._process.stdin
        print(json.dumps([measure, round_number]), file=writer, flush=True)
        line = reader.readline() if reader is not None else ""
        if not line:
            raise RuntimeError(f"Expected a figure of {measure}, but the worker ended; see above.")
        return float(line)

    def __enter__(self) -> "RuleWorker":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()


def answer_requests(rule: str, precision: str, work: str, layers: int) -> None:
    """Runs in the worker: reads lines `[measure, round]`, answers each with a figure."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever libraries print goes to standard error
    kept = [x for x in rewriter.RULES if rule not in (x.name, ALL_RULES)]
    rewriter.RULES = tuple(kept)

    from benchmarks.engines.ours import FunctionalLLM, FunctionalLLMTrainer
    from benchmarks.measures import MEASURES, write_config

    with tempfile.TemporaryDirectory(prefix="flm-bench-") as folder:
        write_config(Path(folder), layers)
        if work == "lora":
            subject = FunctionalLLMTrainer(Path(folder), precision, True, load_weights=False)
        else:
            subject = FunctionalLLM(Path(folder), precision, load_weights=False)
    for line in sys.stdin:
        measure, round_number = json.loads(line)
        print(MEASURES[measure].run(subject, round_number), file=answers)


if __name__ == "__main__":
    sys.exit(main())
