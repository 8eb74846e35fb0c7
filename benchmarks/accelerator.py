"""Measures functional_llm and its peers on one GPU or TPU in a few minutes, with random weights.

Nothing is downloaded. For each kind of work every engine has a process of its own, one after the
other, for the memory of one device is not shared. Each figure is printed and logged as soon as it
is there, so that a run that is cut short loses nothing. What the numbers mean: `text` is the
whole call, prompt included; `first` is the first call, which compiles; `peak` is of the process.
"""

import argparse
import importlib.metadata
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.accelerator_work import ENGINES_OF, SIZES, SMOKE_SIZES, WORKS
from benchmarks.engines import ENGINES
from benchmarks.report import describe_machine, describe_versions
from benchmarks.turns import REPOSITORY, Worker

HERE = Path(__file__).parent
PRECISION = "bfloat16"
SMOKE = ["correctness", "text", "lora_qv", "lora_remat"]  # each part of the code once
HEAD = (
    "| | engine | tokens/s | first call (s) | peak memory (GB) |",
    "|---|---|---:|---:|---:|",
)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accelerator", description=__doc__)
    add = parser.add_argument
    engines, measures = list(ENGINES_OF["text"]), ["correctness", *WORKS]
    add("--engines", nargs="+", choices=engines, default=engines, help="in the order of turns")
    add("--measures", nargs="+", choices=measures, metavar="MEASURE",
        help=f"{', '.join(measures)} (all; with --smoke {', '.join(SMOKE)})")  # fmt: skip
    add("--preset", default="llama3.2_1b", help="whose sizes the models have (%(default)s)")
    add("--minutes", type=float, default=6.0, help="after which nothing is begun (%(default)s)")
    add("--references", type=Path,
        help="folder that `tiny_models reference` has written where torch is")  # fmt: skip
    add("--smoke", action="store_true", help="one layer and a few tokens, to see that it runs")
    add("--note", default="", help="a few words for the heading in the log")
    add("--log", type=Path, default=HERE / "LOG.md", help="file to append to (benchmarks/LOG.md)")
    arguments = parser.parse_args()
    arguments.measures = arguments.measures or (SMOKE if arguments.smoke else measures)
    return arguments


class Log:
    """Prints lines, and appends them to a file at once.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def __call__(self, *lines: str) -> None:
        print(*lines, sep="\n", flush=True)
        with self._path.open("a", encoding="utf-8") as file:
            file.write("\n".join(lines) + "\n")


def main() -> int:
    arguments = parse_arguments()
    end = time.monotonic() + 60 * arguments.minutes
    folder = Path(tempfile.mkdtemp(prefix="flm-accelerator-"))
    log = Log(arguments.log)
    engines = [name for name in arguments.engines if is_installed(name, log)]
    write_model_config(arguments.preset, arguments.smoke, folder)
    what = "one small layer" if arguments.smoke else arguments.preset
    note = f": {arguments.note}" if arguments.note else ""
    now = f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
    log(
        f"\n## {now}: {device_name()}, {what}, {PRECISION}{note}\n",
        f"{describe_machine()}.  ",
        f"{describe_versions(engines)}. Random weights; workers print to {folder}.\n",
    )
    if "correctness" in arguments.measures:
        # A quarter of the time at most: the figures are what the run is for.
        kept, seconds = arguments.references, 15 * arguments.minutes
        log(*check_tiny_models(kept or folder / "tiny", kept is None, arguments.smoke, seconds), "")
    log(*HEAD)
    sizes = SMOKE_SIZES if arguments.smoke else SIZES
    for work in [work for work in WORKS if work in arguments.measures]:
        for engine in [name for name in engines if name in ENGINES_OF[work]]:
            for row in measure(work, engine, sizes[work], folder, end):
                log(row)
    return 0


def is_installed(engine: str, log: Log) -> bool:
    """Returns whether an engine's packages are there; says which are not."""
    for package in ENGINES[engine].packages:
        try:
            importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            log(f"{engine} is left out: {package} is not installed.")
            return False
    return True


def write_model_config(preset: str, smoke: bool, folder: Path) -> None:
    """Writes the `config.json` of a preset, which every engine reads."""
    from benchmarks.measures import write_config

    if smoke:
        write_config(folder, num_layers=1)
        return
    from functional_llm.formats import hf_config
    from functional_llm.presets.sources import read_numbers

    family, config, _ = read_numbers(preset)
    raw = hf_config.write_config(config, family, PRECISION)
    raw["rope_theta"] = config.rope_max_wavelength  # the spelling that KerasHub reads
    (folder / "config.json").write_text(json.dumps(raw))


def device_name() -> str:
    """Returns the name of the card, asked in a process of its own, which lets it go again."""
    code = "import jax; print(jax.local_devices()[0].device_kind, 'JAX', jax.__version__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    return (done.stdout.splitlines() or ["unknown device"])[-1]


def measure(work: str, engine: str, sizes: list[str], folder: Path, end: float) -> Iterator[str]:
    """Yields a row of the table for each size of a kind of work, until the time is over."""
    if time.monotonic() > end:
        yield f"| {work} | {engine} | the time was over | | |"
        return
    worker = Worker(engine, PRECISION, folder, folder, work)
    timer = threading.Timer(end - time.monotonic() + 5, worker.kill)
    timer.start()
    try:
        loaded = worker.wait()
        if "error" in loaded:
            yield f"| {work} | {engine} | {loaded['error']} | | |"
            return
        for size in sizes:
            yield make_row(work, size, engine, worker.ask(size, 1))
    finally:
        timer.cancel()
        worker.close()


def make_row(work: str, size: str, engine: str, answer: dict[str, Any]) -> str:
    """Returns a row of the table."""
    if "error" in answer:
        return f"| {work} {size} | {engine} | failed: {answer['error']} | | |"
    x = answer["figures"]
    numbers = f"{x['rate']:.5g} | {x['first']:.1f} | {x['peak'] / 1e9:.2f}"
    return f"| {work} {size} | {engine} | {numbers} |"


def check_tiny_models(folder: Path, is_new: bool, smoke: bool, seconds: float) -> list[str]:
    """Returns lines about how far the logits of tiny models are from Transformers' on the CPU.

    Args:
        folder: Of the models and Transformers' logits.
        is_new: Whether they are to be written first.
        smoke: Whether a few models are enough.
        seconds: For all of it.
    """
    lines, end = [], time.monotonic() + seconds
    for step in ("reference", "compare") if is_new else ("compare",):
        command = [sys.executable, "-m", "benchmarks.tiny_models", step, str(folder.resolve())]
        limit = max(1.0, end - time.monotonic())
        try:
            done = subprocess.run(
                [*command, *(["--few"] if smoke else [])],
                capture_output=True,
                text=True,
                cwd=REPOSITORY,
                timeout=limit,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return ["- tiny models: the time was over"]
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            return [f"- tiny models, {step}: failed: {last[:300]}"]
        lines += done.stdout.splitlines()
    return [f"- {line}" for line in lines if line.startswith("tiny models")]


if __name__ == "__main__":
    sys.exit(main())
