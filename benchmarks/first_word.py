"""Seconds from the start of a process to its first and its second word, in turns with Transformers.

Both read the same weights: the default preset, and the directory that `save_preset` makes of it.
What is compiled is on the disk, but for the first round, which does not count. Words come through
a pipe. Beside the wall time stands the processor's, of all threads, which others on the machine
change less.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

REPOSITORY = Path(__file__).resolve().parents[1]
PRESET = "smollm2_135m_instruct"
TRANSFORMERS = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.generation.streamers import BaseStreamer

class Printer(BaseStreamer):
    prompt_is_over = False
    def put(self, ids):
        if self.prompt_is_over:
            print(tokenizer.decode(ids), end="", flush=True)
        self.prompt_is_over = True
    def end(self):
        print()

tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="float32")
inputs = tokenizer("The capital of France is", return_tensors="pt")
model.generate(**inputs, max_new_tokens=3, do_sample=False, streamer=Printer())
"""
SAVE = """
import sys
import functional_llm as flm
flm.Backbone.from_preset(sys.argv[1]).save_preset(sys.argv[2])
"""
FIGURES = ("first (s)", "second (s)", "second - first (s)", "processor at first (s)")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.first_word",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--rounds", type=int, default=8, help="of turns (%(default)s)")
    add("--weights", type=Path, help="the directory, if it is there already")
    return parser.parse_args()


def time_words(command: list[str]) -> list[float]:
    """Returns one run's `FIGURES`."""
    started = time.perf_counter()
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    process = subprocess.Popen(
        [sys.executable, *command],
        stdout=subprocess.PIPE,
        cwd=REPOSITORY,
        env=environment,
    )
    with process:
        words: list[float] = []
        processor = 0.0
        while process.stdout is not None and os.read(process.stdout.fileno(), 1 << 16):
            words.append(time.perf_counter() - started)
            processor = processor or _processor_seconds(process.pid)
    if process.returncode or len(words) < 2:
        raise RuntimeError(f"{command} wrote {len(words)} words, code {process.returncode}")
    return [words[0], words[1], words[1] - words[0], processor]


def _processor_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure(commands: dict[str, list[str]], rounds: int) -> dict[str, list[list[float]]]:
    """Returns `FIGURES` of each round of each command; round 0 warms up and does not count."""
    figures: dict[str, list[list[float]]] = {name: [] for name in commands}
    for number in range(rounds + 1):
        for name, command in commands.items():
            row = time_words(command)
            print(f"round {number}  {name:48} " + "  ".join(f"{x:.2f}" for x in row), flush=True)
            if number:
                figures[name].append(row)
    return figures


def make_table(figures: dict[str, list[list[float]]]) -> str:
    """Returns a table in Markdown: medians, and the least and the largest in brackets."""
    lines = ["| | " + " | ".join(FIGURES) + " |", "|---" + "|---:" * len(FIGURES) + "|"]
    for name, rows in figures.items():
        columns = list(zip(*rows, strict=True))
        cells = [f"{median(x):.2f} ({min(x):.2f} to {max(x):.2f})" for x in columns]
        lines.append("| " + " | ".join([name, *cells]) + " |")
    return "\n".join(lines)


def main() -> None:
    arguments = parse_arguments()
    with tempfile.TemporaryDirectory() as folder:
        weights = arguments.weights or Path(folder) / PRESET
        if not weights.is_dir():
            subprocess.run([sys.executable, "-c", SAVE, PRESET, str(weights)], check=True)
        options = ["--max-new-tokens", "3"]
        commands = {
            "scripts/generate.py, directory": [
                "scripts/generate.py",
                "--preset",
                str(weights),
                *options,
            ],
            "python -m functional_llm generate": ["-m", "functional_llm", "generate", *options],
            "transformers": ["-c", TRANSFORMERS, str(weights)],
        }
        print("\n" + make_table(measure(commands, arguments.rounds)))


if __name__ == "__main__":
    main()
