"""The processes of the engines, and their turns.

The speed of a machine drifts by a factor of up to two from hour to hour: only what was measured in
turns, A B C A B C, can be compared. While one works, the others sleep.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.accelerator_work import WORKS as ON_ACCELERATORS
from benchmarks.engines import ENGINES
from benchmarks.memory import read_bandwidth

REPOSITORY = Path(__file__).resolve().parents[1]
Answer = dict[str, Any]  # {"figures": ...} or {"error": ...}


class Worker:
    """The process of one engine in one precision, for one kind of work.

    Args:
        engine: Key of `ENGINES`.
        precision: One of the engine's precisions.
        weights: Directory in Hugging Face layout.
        logs: Folder for what the process prints.
        work: One of `measures.WORKS`.
    """

    def __init__(
        self, engine: str, precision: str, weights: Path, logs: Path, work: str = "generate"
    ) -> None:
        self.engine, self.precision = engine, precision
        self.name = f"{engine} {precision}"
        self._weights = weights
        self._log = logs / f"{engine}-{precision}-{work}.log"
        # What is to be compiled shall not be found on the disk.
        is_cold = work == "compile" or work in ON_ACCELERATORS
        cold = {"JAX_ENABLE_COMPILATION_CACHE": "0"} if is_cold else {}
        arguments = [engine, precision, str(weights), work]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.worker", *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                cwd=REPOSITORY,
                env={**os.environ, **cold},
            )

    def wait(self) -> Answer:
        """Returns the next answer; that of loading comes without being asked."""
        pipe = self._process.stdout
        line = "" if pipe is None else pipe.readline()
        if not line:
            code = self._process.wait()
            return {"error": f"the process ended (code {code}); it printed to {self._log}"}
        return json.loads(line)

    def ask(self, measure: str, round_number: int) -> Answer:
        """Lets the worker measure, and waits for it."""
        request = {"measure": measure, "round": round_number}
        try:
            print(json.dumps(request), file=self._process.stdin, flush=True)
        except (BrokenPipeError, ValueError):
            pass  # `wait` finds out why
        return self.wait()

    def first_tokens(self, xla_cache: Path, count: int) -> Answer:
        """Starts the engine's script anew; returns the seconds until so many tokens are printed.

        Args:
            xla_cache: Folder of compiled programs.
            count: 1 or 2. A script that streams writes both, each as soon as it is there.
        """
        entry = ENGINES[self.engine]
        if entry.script:
            script = [*entry.script, *entry.script_options[self.precision]]
        else:
            script = ["-m", "benchmarks.first_token", self.engine, self.precision]
            script += [str(self._weights), str(count)]
        environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(xla_cache)}
        environment["PYTHONPATH"] = str(REPOSITORY)
        with self._log.open("ab") as log:
            started = time.perf_counter()
            process = subprocess.Popen(
                [sys.executable, *script],
                stdout=subprocess.PIPE,
                stderr=log,
                cwd=REPOSITORY,
                env=environment,
            )
            with process:
                seconds = []
                while process.stdout is not None and os.read(process.stdout.fileno(), 1 << 16):
                    seconds.append(time.perf_counter() - started)
        if not seconds or process.returncode:
            return {"error": f"the script ended with code {process.returncode}; see {self._log}"}
        return {"figures": seconds[min(count if entry.script else 1, len(seconds)) - 1]}

    def cpu_seconds(self) -> float:
        """Returns the processor time that the worker has had so far, all threads together."""
        stat = Path(f"/proc/{self._process.pid}/stat")
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            return 0.0
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def kill(self) -> None:
        """Ends the process in whatever it does."""
        self._process.kill()

    def close(self) -> None:
        """Ends the process when it has answered."""
        try:
            self._process.communicate(timeout=20)  # the end of its input ends the worker
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()


class Turns:
    """Figures of every worker in every round.

    Args:
        progress: Called with a line for each figure.
        folder: For compiled programs.
    """

    def __init__(self, progress: Callable[[str], None], folder: Path) -> None:
        self.figures: dict[str, dict[str, list[float]]] = {}  # measure -> worker -> rounds
        self.errors: dict[str, dict[str, str]] = {}  # worker -> measure -> message
        self.others: dict[str, list[float]] = {}  # measure -> share of the machine, each turn
        self.bandwidths: dict[str, list[float]] = {}  # measure -> of memory, GB/s, each round
        self._progress = progress
        self._folder = folder

    def run(self, workers: list[Worker], measure: str, rounds: int) -> None:
        """Measures in turns; round 0 warms up and does not count."""
        for round_number in range(rounds + 1):
            if round_number:
                self.bandwidths.setdefault(measure, []).append(read_bandwidth())
            for worker in workers:
                if measure in self.errors.get(worker.name, {}):
                    continue
                began, busy, own = time.perf_counter(), _busy_seconds(), worker.cpu_seconds()
                answer = worker.ask(measure, round_number)
                others = _busy_seconds() - busy - (worker.cpu_seconds() - own)
                share = others / (time.perf_counter() - began) / len(os.sched_getaffinity(0))
                if round_number:
                    self.others.setdefault(measure, []).append(max(0.0, share))
                self._note(measure, round_number, worker, answer)

    def run_first_tokens(self, workers: list[Worker], rounds: int) -> None:
        """Measures process start to first and second token: cold in round 0, then warm."""
        for round_number in range(rounds + 1):
            temperature = "warm" if round_number else "cold"
            for worker in workers:
                for count, name in ((1, "first_token"), (2, "second_token")):
                    cache = self._folder / f"{worker.name.replace(' ', '-')}-{count}"
                    answer = worker.first_tokens(cache, count)
                    self._note(f"{name}_{temperature}", max(1, round_number), worker, answer)

    def _note(self, measure: str, round_number: int, worker: Worker, answer: Answer) -> None:
        if "error" in answer:
            self.errors.setdefault(worker.name, {})[measure] = answer["error"]
        elif round_number > 0:
            by_worker = self.figures.setdefault(measure, {})
            by_worker.setdefault(worker.name, []).append(answer["figures"])
        shown = answer.get("error") or f"{answer['figures']:.4g}"
        label = f"round {round_number}" if round_number else "warm-up"
        self._progress(f"{measure:>18}  {label:8}  {worker.name:24}  {shown}")


def _busy_seconds() -> float:
    """Returns the time that all processors together have not been idle; 0 where nobody tells."""
    stat = Path("/proc/stat")
    if not stat.is_file():
        return 0.0
    fields = [int(x) for x in stat.read_text().partition("\n")[0].split()[1:9]]
    idle = fields[3] + fields[4]  # idle, and waiting for a disk
    return (sum(fields) - idle) / os.sysconf("SC_CLK_TCK")
