"""Measures functional_llm and its peers on SmolLM2-135M, each in its own process, in turns.

Prints medians, their spread and ratios, and appends them to the log with date, machine and
versions. A ratio above 1 means that the first engine is better; it is the median of the rounds,
each compared with itself.

int8 is whatever an engine means by it: llama.cpp's is Q8_0. In bfloat16, LoRA trains beside weights
in bfloat16, and full training keeps its weights in float32.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from benchmarks import report
from benchmarks.engines import ENGINES
from benchmarks.measures import APART, CHECK, MEASURES, WORKS
from benchmarks.turns import Turns, Worker

HERE = Path(__file__).parent
FIRST_TOKEN = "first_token"
EXAMPLES = """examples:
  python -m benchmarks --rounds 5
  python -m benchmarks --measures decode_1 decode_8 --precisions float32
  python -m benchmarks --engines functional_llm transformers --measures first_token
  python -m benchmarks --engines functional_llm keras_hub --measures compile_4 compile_30

The rules of the CPU rewriter, each on and off: python -m benchmarks.cpu_rules --help
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
        default=["float32", "bfloat16", "int8"],
        metavar="PRECISION",
        help="of the weights; an engine sits out what it does not know (float32 bfloat16 int8)",
    )
    add(
        "--measures",
        nargs="+",
        choices=measures,
        metavar="MEASURE",
        default=measures,
        help=f"what is measured: {', '.join(measures)} (all)",
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
    turns = Turns(lambda line: print(line, file=sys.stderr, flush=True), folder)
    agreement: list[str] = []
    try:
        works = {
            MEASURES[name].work if name in MEASURES else "generate" for name in arguments.measures
        }
        for work in [work for work in WORKS if work in works]:
            each = [[x] for x in arguments.precisions]
            for precisions in each if work in APART else [arguments.precisions]:
                workers = start_workers(work, precisions, arguments, turns, weights, folder)
                agreement += run_work(work, workers, arguments, turns)
    except KeyboardInterrupt:
        print("interrupted: what was measured so far follows", file=sys.stderr)
    table = report.make_table(turns, first=arguments.engines[0])
    table += "\n\n" + report.make_best_table(turns, first=arguments.engines[0])
    print(*agreement, *report.describe_machine_during(turns), "", table, sep="\n")
    if not arguments.no_log:
        report.append_log(arguments.log, turns, table, agreement, arguments.note)
    if turns.figures:
        report.save_plot(arguments.plot, turns)
    return 0 if turns.figures else 1


def run_work(
    work: str, workers: list[Worker], arguments: argparse.Namespace, turns: Turns
) -> list[str]:
    """Runs the measures of one kind of work, in processes that end with it.

    Returns:
        Lines that compare what the engines computed.
    """
    if not workers:
        return []
    try:
        agreement = check(workers, work, turns)
        for name in MEASURES:
            if name in arguments.measures and MEASURES[name].work == work:
                turns.run(workers, name, 1 if MEASURES[name].once else arguments.rounds)
        if work == "generate" and FIRST_TOKEN in arguments.measures:
            turns.run_first_tokens(workers, arguments.rounds)
    finally:
        for worker in workers:
            worker.close()
    return agreement


def start_workers(
    work: str,
    precisions: list[str],
    arguments: argparse.Namespace,
    turns: Turns,
    weights: Path,
    folder: Path,
) -> list[Worker]:
    """Starts and loads one after the other; says who cannot take part."""
    workers = []
    for precision in precisions:
        for engine in arguments.engines:
            if not ENGINES[engine].does(work, precision):
                continue
            worker = Worker(engine, precision, weights, folder, work)
            answer = worker.wait()
            told = answer.get("error", "loaded")
            print(f"{worker.name}, {work}: {told}", file=sys.stderr, flush=True)
            if "error" in answer:
                turns.errors.setdefault(worker.name, {})[f"load to {work}"] = told
                worker.close()
            else:
                workers.append(worker)
    return workers


def check(workers: list[Worker], work: str, turns: Turns) -> list[str]:
    """Compares what the engines compute before anything is timed.

    Greedy ids with Transformers' in float32, or with the first worker's; or losses.
    """
    if work == "compile":
        return []
    answers = {worker.name: worker.ask(CHECK, 0) for worker in workers}
    for name, answer in answers.items():
        if "error" in answer:
            turns.errors.setdefault(name, {})[f"{CHECK} of {work}"] = answer["error"]
    figures = {name: x["figures"] for name, x in answers.items() if "error" not in x}
    if not figures:
        return [f"no engine passed the check of {work}"]
    if work != "generate":
        return report.compare_losses(work, {name: x["losses"] for name, x in figures.items()})
    ids = {name: x["ids"] for name, x in figures.items()}
    reference = "transformers float32" if "transformers float32" in ids else next(iter(ids))
    return report.compare_ids(ids, reference)


if __name__ == "__main__":
    sys.exit(main())
