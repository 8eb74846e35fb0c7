"""Tables, the log and the plot."""

import importlib.metadata
import os
import platform
from collections.abc import Iterable
from datetime import UTC, datetime
from itertools import takewhile
from pathlib import Path
from statistics import median

from benchmarks.engines import ENGINES
from benchmarks.measures import MEASURES
from benchmarks.turns import Turns

FIRST_TOKEN = {
    "first_token_cold": "process start to first token, nothing compiled",
    "first_token_warm": "process start to first token, compilation cache warm",
}
Figures = dict[str, list[float]]  # worker -> a figure a round


def title(measure: str) -> str:
    """Returns a measure's name and unit."""
    if measure in FIRST_TOKEN:
        return f"{FIRST_TOKEN[measure]} (s)"
    return f"{MEASURES[measure].title} ({MEASURES[measure].unit})"


def more_is_better(measure: str) -> bool:
    """Returns whether a large figure is a good one."""
    return measure not in FIRST_TOKEN and MEASURES[measure].more_is_better


def ratio(measure: str, figures: Figures, ours: str, theirs: str) -> float:
    """Returns how many times better `ours` is: the median over rounds, each compared with itself.

    Neighbouring turns saw the same machine; medians taken apart might not have.
    """
    pairs = zip(figures[ours], figures[theirs], strict=False)
    quotients = [a / b if more_is_better(measure) else b / a for a, b in pairs]
    return median(quotients)


def make_table(turns: Turns, first: str) -> str:
    """Returns Markdown: a row for each measure and worker, with the ratio of the first engine.

    Args:
        turns: What was measured.
        first: Name of the engine that is compared with the others, in the same precision.
    """
    lines = [
        f"| | engine | median | lowest to highest | {first} is better by |",
        "|---|---|---:|---:|---:|",
    ]
    for measure, figures in turns.figures.items():
        for worker, values in figures.items():
            engine, _, precision = worker.partition(" ")
            ours = f"{first} {precision}"
            against = ""
            if engine != first and ours in figures:
                against = f"{ratio(measure, figures, ours, worker):.2f}×"
            spread = f"{min(values):.4g} to {max(values):.4g}"
            cells = [title(measure), worker, f"{median(values):.4g}", spread, against]
            lines.append("| " + " | ".join(cells) + " |")
    for worker, errors in turns.errors.items():
        lines += [f"| {name} | {worker} | failed: {text} | | |" for name, text in errors.items()]
    return "\n".join(lines)


def describe_machine() -> str:
    """Returns processor, cores, memory, system."""
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.is_file() else ""
    names = [line.partition(":")[2].strip() for line in text.splitlines() if "model name" in line]
    features = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in text]
    gigabytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return (
        f"{names[0] if names else platform.processor()}, {len(os.sched_getaffinity(0))} cores "
        f"({', '.join(features)}), {gigabytes:.0f} GiB, {platform.system()}, "
        f"Python {platform.python_version()}"
    )


def describe_versions(engines: Iterable[str]) -> str:
    """Returns the versions of what took part."""
    packages = dict.fromkeys(name for engine in engines for name in ENGINES[engine].packages)
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)


def describe_others(turns: Turns) -> str:
    """Returns how much of the machine other programs had while the engines took their turns."""
    told = [f"{name} {median(shares):.0%}" for name, shares in turns.others.items()]
    return f"other programs had this share of the machine (median of the turns): {', '.join(told)}"


def append_log(path: Path, turns: Turns, table: str, agreement: list[str], note: str) -> None:
    """Adds a run to the log, whatever its result."""
    load = ", ".join(f"{x:.2f}" for x in os.getloadavg())
    engines = dict.fromkeys(worker.engine for worker in turns.workers)
    parts = [
        f"\n## {datetime.now(UTC):%Y-%m-%d %H:%M} UTC{': ' + note if note else ''}\n",
        f"{describe_machine()}; load average at the end {load}.  ",
        f"{describe_versions(engines)}.\n",
        *[f"- {line}" for line in [*agreement, describe_others(turns)]],
        f"\n{table}\n",
    ]
    with path.open("a", encoding="utf-8") as file:
        file.write("\n".join(parts))


def save_plot(path: Path, turns: Turns) -> None:
    """Draws a panel for each measure, with a dot for each round."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    measures = list(turns.figures)
    columns = min(3, len(measures))
    rows = -(-len(measures) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(5 * columns, 3 * rows), squeeze=False)
    for ax in axes.flat[len(measures) :]:
        ax.axis("off")
    for ax, measure in zip(axes.flat, measures, strict=False):
        figures = turns.figures[measure]
        ax.barh(
            list(figures), [median(values) for values in figures.values()], color=_colors(figures)
        )
        for worker, values in figures.items():
            ax.plot(values, [worker] * len(values), "k.", markersize=3)
        ax.invert_yaxis()
        ax.set_title(title(measure), fontsize=9)
        ax.tick_params(labelsize=8)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _colors(workers: Iterable[str]) -> list[str]:
    engines = list(ENGINES)
    return [f"C{engines.index(worker.partition(' ')[0])}" for worker in workers]


def compare_ids(ids: dict[str, list[list[int]]], reference: str) -> list[str]:
    """Returns a line for each worker: whether its greedy ids are the reference's.

    Args:
        ids: Worker -> ids of each prompt.
        reference: The worker to compare with.
    """
    lines = []
    for worker, rows in ids.items():
        pairs = list(zip(rows, ids[reference], strict=True))
        agreed = [_common(row, expected) for row, expected in pairs]
        total = sum(len(expected) for _, expected in pairs)
        same = sum(agreed) == total
        told = "as" if same else f"{sum(agreed)} of {total} before the first difference, against"
        if worker != reference:
            lines.append(f"greedy ids of {worker}: {told} {reference}")
    return lines


def _common(row: list[int], expected: list[int]) -> int:
    """Returns how many ids agree before the first that does not."""
    pairs = zip(row, expected, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
