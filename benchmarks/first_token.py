"""Loads an engine and prints new tokens: the script of engines that bring none of their own.

They print all tokens at once. So that the second token is timed as the first one is, it takes a
run of its own.
"""

import sys
from pathlib import Path

from benchmarks.engines import ENGINES
from benchmarks.measures import make_prompts


def main() -> None:
    engine_name, precision, weights, count = sys.argv[1:]
    engine = ENGINES[engine_name].load("generate", Path(weights), precision)
    print(engine.generate(make_prompts(1, 5, 0), int(count))[0], flush=True)


if __name__ == "__main__":
    main()
