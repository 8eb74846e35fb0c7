"""Tables, the log and the plot."""

import importlib.metadata
import os
import platform
from collections.abc import Iterable
from datetime import UTC, datetime
from itertools import takewhile
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.engines import ENGINES
from benchmarks.measures import APART, MEASURES
from benchmarks.turns import Turns

FIRST_TOKEN = {
    "first_token_cold": "process start to first token, nothing compiled",
    "first_token_warm": "process start to first token, compilation cache warm",
    "second_token_cold": "process start to second token, nothing compiled",
    "second_token_warm": "process start to second token, compilation cache warm",
}
Figures = dict[str, list[float]]  # worker -> a figure a round
_STYLES = {"float32": "-", "bfloat16": "--", "int8": ":"}  # of curves


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


def make_best_table(turns: Turns, first: str) -> str:
    """Returns Markdown: each engine in the precision that is best for it, a row for each measure.

    Precisions that did not take turns with one another have no ratio.

    Args:
        turns: What was measured.
        first: Name of the engine that is compared with the others.
    """
    names = [worker for figures in turns.figures.values() for worker in figures]
    engines = list(dict.fromkeys([first, *map(_engine, names)]))
    lines = [
        "Each engine in its best precision, and by how much "
        f"{first} is better in the precision that is best for it:\n",
        "| | " + " | ".join(engines) + " |",
        "|---|" + "---|" * len(engines),
    ]
    for measure, figures in turns.figures.items():
        best = best_workers(measure, figures)
        cells = [title(measure)]
        for engine in engines:
            cell = ""
            if engine in best:
                cell = f"{best[engine].partition(' ')[2]} {median(figures[best[engine]]):.4g}"
            if engine in best and engine != first and comparable(measure, best, first, engine):
                cell += f" ({ratio(measure, figures, best[first], best[engine]):.2f}×)"
            cells.append(cell)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def best_workers(measure: str, figures: Figures) -> dict[str, str]:
    """Returns engine -> its worker with the best median."""
    order = sorted(figures, key=lambda worker: median(figures[worker]))
    if more_is_better(measure):
        order.reverse()
    best: dict[str, str] = {}
    for worker in order:
        best.setdefault(_engine(worker), worker)
    return best


def comparable(measure: str, best: dict[str, str], ours: str, theirs: str) -> bool:
    """Returns whether the best workers of two engines took turns with one another."""
    if ours not in best or theirs not in best:
        return False
    same = best[ours].partition(" ")[2] == best[theirs].partition(" ")[2]
    return same or measure in FIRST_TOKEN or MEASURES[measure].work not in APART


def _engine(worker: str) -> str:
    return worker.partition(" ")[0]


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


def describe_machine_during(turns: Turns) -> list[str]:
    """Returns lines about what the engines had of the machine, and how fast its memory was."""
    return [describe_others(turns), describe_bandwidths(turns)]


def describe_bandwidths(turns: Turns) -> str:
    """Returns how fast all processors together read memory, before each round."""
    told = [
        f"{name} {median(values):.0f} ({min(values):.0f} to {max(values):.0f})"
        for name, values in turns.bandwidths.items()
    ]
    return f"memory was read at so many GB/s (median of the rounds, range): {', '.join(told)}"


def append_log(path: Path, turns: Turns, table: str, agreement: list[str], note: str) -> None:
    """Adds a run to the log, whatever its result."""
    load = ", ".join(f"{x:.2f}" for x in os.getloadavg())
    workers = [worker for figures in turns.figures.values() for worker in figures]
    engines = dict.fromkeys(map(_engine, workers))
    parts = [
        f"\n## {datetime.now(UTC):%Y-%m-%d %H:%M} UTC{': ' + note if note else ''}\n",
        f"{describe_machine()}; load average at the end {load}.  ",
        f"{describe_versions(engines)}.\n",
        *[f"- {line}" for line in [*agreement, *describe_machine_during(turns)]],
        f"\n{table}\n",
    ]
    with path.open("a", encoding="utf-8") as file:
        file.write("\n".join(parts))


def save_plot(path: Path, turns: Turns) -> None:
    """Draws a panel for each measure, with a dot for each round; compile times as curves."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    depths = {name: x for name, x in turns.figures.items() if name.startswith("compile_")}
    measures = [name for name in turns.figures if name not in depths]
    panels = len(measures) + bool(depths)
    columns = min(3, panels)
    rows = -(-panels // columns)
    tall = 1 + 0.2 * max(len(figures) for figures in turns.figures.values())
    size = (5 * columns, max(3.0, tall) * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False)
    for ax in axes.flat[panels:]:
        ax.axis("off")
    for ax, measure in zip(axes.flat, measures, strict=False):
        _draw_bars(ax, turns.figures[measure])
        ax.set_title(title(measure), fontsize=9)
    if depths:
        _draw_depths(axes.flat[panels - 1], depths)
    for ax in axes.flat[:panels]:
        ax.tick_params(labelsize=8)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _draw_bars(ax: Any, figures: Figures) -> None:
    ax.barh(
        list(figures),
        [median(values) for values in figures.values()],
        color=[_color(worker) for worker in figures],
    )
    for worker, values in figures.items():
        ax.plot(values, [worker] * len(values), "k.", markersize=3)
    ax.invert_yaxis()


def _draw_depths(ax: Any, depths: dict[str, Figures]) -> None:
    for worker in dict.fromkeys(worker for figures in depths.values() for worker in figures):
        points = [
            (int(name.removeprefix("compile_")), median(figures[worker]))
            for name, figures in depths.items()
            if worker in figures
        ]
        style = _STYLES.get(worker.partition(" ")[2], "-.")
        ax.plot(*zip(*points, strict=True), style, marker=".", color=_color(worker), label=worker)
    ax.set_title("compile (s) by number of layers", fontsize=9)
    ax.set_ylim(bottom=0)
    ax.legend(fontsize=7)


def _color(worker: str) -> str:
    return f"C{list(ENGINES).index(_engine(worker))}"


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


def compare_losses(work: str, losses: dict[str, list[float]]) -> list[str]:
    """Returns a line for each worker: its losses on the same rows, before and after one step.

    Args:
        work: `"lora"`, whose random start differs from engine to engine, or `"train"`.
        losses: Worker -> two losses.
    """
    return [
        f"{work}: loss of {worker}: {first:.4f}, after one step {second:.4f}"
        for worker, (first, second) in losses.items()
    ]


def _common(row: list[int], expected: list[int]) -> int:
    """Returns how many ids agree before the first that does not."""
    pairs = zip(row, expected, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
