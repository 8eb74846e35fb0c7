"""Loads an engine and prints one token: the script of engines that bring none of their own."""

import sys
from pathlib import Path

from benchmarks.engines import ENGINES
from benchmarks.measures import make_prompts


def main() -> None:
    engine_name, precision, weights = sys.argv[1:]
    engine = ENGINES[engine_name].load("generate", Path(weights), precision)
    print(engine.generate(make_prompts(1, 5, 0), 1)[0], flush=True)


if __name__ == "__main__":
    main()
