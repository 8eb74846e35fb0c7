"""The process of one engine: reads requests from standard input, answers on standard output.

Between two requests it sleeps, so that the others have the machine. A request is a line of JSON,
`{"measure": ..., "round": ...}`; so is the answer, `{"figures": {...}}` or `{"error": ...}`.
"""

import json
import os
import sys
import time
import traceback
from pathlib import Path

from benchmarks import accelerator_work
from benchmarks.engines import ENGINES
from benchmarks.measures import CHECK, CHECKS, MEASURES


def main() -> None:
    engine, precision, weights, work = sys.argv[1:]
    # Whatever libraries print goes to standard error.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    started = time.perf_counter()
    try:
        if work in accelerator_work.WORKS:
            subject = accelerator_work.load(engine, work, Path(weights), precision)
        else:
            subject = ENGINES[engine].load(work, Path(weights), precision)
    except Exception as error:
        traceback.print_exc()
        print(json.dumps({"error": _first_line(error)}), file=answers)
        return
    print(json.dumps({"figures": {"load": time.perf_counter() - started}}), file=answers)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if request["measure"] == CHECK:
                answer = {"figures": CHECKS[work](subject)}
            elif work in accelerator_work.WORKS:
                answer = {"figures": accelerator_work.measure(subject, request["measure"])}
            else:
                run = MEASURES[request["measure"]].run
                answer = {"figures": run(subject, request["round"])}
        except Exception as error:  # one engine's failure is a result, and the others go on
            traceback.print_exc()
            answer = {"error": _first_line(error)}
        print(json.dumps(answer), file=answers)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"


if __name__ == "__main__":
    main()
