"""Measures functional_llm and its peers on SmolLM2-135M, each in its own process, in turns.

Prints medians, their spread and ratios, and appends them to the log with date, machine and
versions. A ratio above 1 means that the first engine is better; it is the median of the rounds,
each compared with itself.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from benchmarks import report
from benchmarks.engines import ENGINES
from benchmarks.measures import CHECK, MEASURES
from benchmarks.turns import Turns, Worker

HERE = Path(__file__).parent
FIRST_TOKEN = "first_token"
EXAMPLES = """examples:
  python -m benchmarks --rounds 5
  python -m benchmarks --measures decode_1 decode_8 --precisions float32
  python -m benchmarks --engines functional_llm transformers --measures first_token
"""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    measures = [*MEASURES, FIRST_TOKEN]
    default = ["decode_1", "decode_8", "prefill_32", "prefill_512", "peak_memory", FIRST_TOKEN]
    add(
        "--engines",
        nargs="+",
        choices=ENGINES,
        metavar="ENGINE",
        default=list(ENGINES),
        help=f"who takes part, in the order of turns: {', '.join(ENGINES)} (all)",
    )
    add(
        "--precisions",
        nargs="+",
        default=["float32", "bfloat16"],
        metavar="PRECISION",
        help="of the weights; an engine sits out what it does not know (float32 bfloat16)",
    )
    add(
        "--measures",
        nargs="+",
        choices=measures,
        metavar="MEASURE",
        default=default,
        help=f"what is measured: {', '.join(measures)} ({' '.join(default)})",
    )
    add("--rounds", type=int, default=3, help="turns of each engine, after one to warm up (3)")
    add("--note", default="", help="a few words for the heading in the log")
    add("--log", type=Path, default=HERE / "LOG.md", help="file to append to (benchmarks/LOG.md)")
    add("--no-log", action="store_true", help="only print")
    add("--plot", type=Path, default=HERE / "plot.png", help="picture (benchmarks/plot.png)")
    arguments = parser.parse_args()
    if arguments.rounds < 1:
        parser.error("--rounds: expected at least 1")
    return arguments


def main() -> int:
    arguments = parse_arguments()
    from benchmarks.weights import prepare_weights  # after --help, which shall not wait for it

    weights = prepare_weights()
    folder = Path(tempfile.mkdtemp(prefix="flm-bench-"))
    print(f"workers print to {folder}", file=sys.stderr)
    workers = start_workers(arguments, weights, folder)
    turns = Turns(workers, lambda line: print(line, file=sys.stderr, flush=True), folder)
    agreement: list[str] = []
    try:
        agreement = check(turns)
        for measure in arguments.measures:
            if measure == FIRST_TOKEN:
                turns.run_first_token(arguments.rounds)
            else:
                turns.run(measure, 1 if measure == "peak_memory" else arguments.rounds)
    except KeyboardInterrupt:
        print("interrupted: what was measured so far follows", file=sys.stderr)
    finally:
        for worker in workers:
            worker.close()
    table = report.make_table(turns, first=arguments.engines[0])
    print(*agreement, report.describe_others(turns), "", table, sep="\n")
    if not arguments.no_log:
        report.append_log(arguments.log, turns, table, agreement, arguments.note)
    if turns.figures:
        report.save_plot(arguments.plot, turns)
    return 0 if turns.figures else 1


def start_workers(arguments: argparse.Namespace, weights: Path, folder: Path) -> list[Worker]:
    """Starts and loads one after the other; says who cannot take part."""
    workers = []
    for precision in arguments.precisions:
        for engine in arguments.engines:
            if precision not in ENGINES[engine].precisions:
                continue
            worker = Worker(engine, precision, weights, folder)
            answer = worker.wait()
            print(f"{worker.name}: {answer.get('error', 'loaded')}", file=sys.stderr, flush=True)
            workers.append(worker)
    return workers


def check(turns: Turns) -> list[str]:
    """Compares greedy ids with Transformers' in float32, or with the first worker's."""
    answers = {worker.name: worker.ask(CHECK, 0) for worker in turns.workers}
    for name, answer in answers.items():
        if "error" in answer:
            turns.errors.setdefault(name, {})[CHECK] = answer["error"]
    ids = {name: x["figures"]["ids"] for name, x in answers.items() if "error" not in x}
    if not ids:
        return ["no engine gave ids"]
    reference = "transformers float32" if "transformers float32" in ids else next(iter(ids))
    return report.compare_ids(ids, reference)


if __name__ == "__main__":
    sys.exit(main())
