"""A plot of the losses."""

from collections.abc import Sequence
from pathlib import Path


def plot_losses(path: Path, losses: Sequence[float], held_out: Sequence[Sequence[float]]) -> None:
    """Plots training and held-out loss over the steps, as a PNG file.

    Args:
        path: The file.
        losses: Training loss of each step.
        held_out: `[step, loss]` of each evaluation.

    Raises:
        ImportError: If matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError(
            "A loss curve needs matplotlib, which is not installed. Install it: "
            "pip install matplotlib."
        ) from None
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="loss a token (nats)")
    axes.plot(range(1, len(losses) + 1), losses, label="training", linewidth=1, alpha=0.8)
    if held_out:
        steps, values = zip(*held_out, strict=True)
        axes.plot(steps, values, label="held out", marker="o", linewidth=2)
    axes.grid(alpha=0.3)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
