"""Which experts a text uses, as numbers and as a picture.

Shapes: L layers with experts, T tokens, E experts, k experts chosen for a token.
"""

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import keras
import numpy as np

from functional_llm.generation.prompts import encode_prompt, only_prompt
from functional_llm.generation.text_generator import TextGenerator
from functional_llm.graph.capturing import capture
from functional_llm.graph.selection import walk
from functional_llm.layers.experts import ExpertDispatch
from functional_llm.tokenizers import TextTokenizer

Figure: TypeAlias = Any  # a matplotlib.figure.Figure; matplotlib may be missing
_MOST_TOKENS = 200  # that a picture has columns for
_MOST_WRITTEN = 60  # columns in which numbers can be read


@dataclass(frozen=True, eq=False)
class Routing:
    """The experts that a text used. A notebook shows it as its picture.

    Args:
        paths: Of the layers that choose experts, L.
        tokens: The text's tokens, T; their ids where there is no tokenizer.
        experts: For each layer, the numbers of the experts chosen, (T, k).
        weights: For each layer, the weights of these, (T, k).
        num_experts: For each layer, E.
        by_token: Whether the picture has a column for each token, not for each expert.
    """

    paths: list[str]
    tokens: list[str]
    experts: list[np.ndarray]
    weights: list[np.ndarray]
    num_experts: list[int]
    by_token: bool = False

    @property
    def shares(self) -> np.ndarray:
        """How large a share of a layer's choices each expert has, (L, E); a row's sum is 1.

        A layer with fewer experts than another has NaN behind them.
        """
        shares = np.full((len(self.paths), max(self.num_experts)), np.nan)
        for row, experts, count in zip(shares, self.experts, self.num_experts, strict=True):
            row[:count] = np.bincount(experts.ravel(), minlength=count) / experts.size
        return shares

    def figure(self) -> Figure:
        """Returns the picture, a figure of matplotlib.

        Raises:
            ImportError: If matplotlib is missing.
            ValueError: If there are more tokens than a picture has columns for.
        """
        return _draw_tokens(self) if self.by_token else _draw_shares(self)

    def save(self, to_file: str | Path) -> Path:
        """Writes the picture: `.png`, `.svg` or `.pdf`. Returns the path.

        Raises:
            ImportError: If matplotlib is missing.
            ValueError: If the file's ending is another.
        """
        to_file = _checked(to_file)
        figure = self.figure()
        to_file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(to_file, dpi=120)
        return to_file

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.figure().savefig(buffer, format="png", dpi=100)
        return buffer.getvalue()


def plot_routing(
    model: keras.Model | TextGenerator,
    text: Any,
    to_file: str | Path | None = None,
    by_token: bool = False,
    tokenizer: TextTokenizer | None = None,
) -> Routing:
    """Shows which experts a text uses: a row for each layer, a column for each expert.

    The darker a field, the more of the layer's choices were this expert. A layer that uses all
    alike has `1 / E` everywhere.

    Args:
        model: A TextGenerator, or a model with experts; edited or not.
        text: A text; messages, which the chat template writes; or ids.
        to_file: The picture to write, `.png`, `.svg` or `.pdf`; `None` for none. A notebook shows
            what the function returns.
        by_token: Whether columns are tokens, and a field has the number of the expert with the
            largest weight.
        tokenizer: For a text, if `model` is no TextGenerator.

    Returns:
        The numbers; their picture is made when somebody looks at it.

    Raises:
        ImportError: If there is a picture to draw, and matplotlib is missing.
        ValueError: If the model has no experts, `text` is a text and there is no tokenizer, or the
            picture would have too many tokens or another ending.
    """
    if isinstance(model, TextGenerator):
        model, tokenizer = model.backbone, tokenizer or model.tokenizer
    layers = {path: x for path, x in walk(model) if isinstance(x, ExpertDispatch)}
    if not layers:
        raise ValueError(f"Expected a model with experts: '{model.name}' has none.")
    if to_file is not None:
        _checked(to_file)
        _import_figure()
    prompt: Any = only_prompt(text)
    if tokenizer is None and (isinstance(prompt, str) or not np.size(prompt)):
        raise ValueError(
            f"Expected a TextGenerator, a `tokenizer`, or ids. Received the text {text!r:.60}."
        )
    ids = np.asarray(prompt if tokenizer is None else encode_prompt(tokenizer, prompt), "int32")
    captured = capture(model, lambda _, path: path in layers, inputs=True)
    found = captured({"token_ids": ids[None]})["captured"]
    names = ids.tolist() if tokenizer is None else [tokenizer.decode([x]) for x in ids.tolist()]
    routing = Routing(
        paths=list(layers),
        tokens=[str(x) for x in names],
        experts=[np.asarray(found[path]["experts"])[0] for path in layers],
        weights=[np.asarray(found[path]["weights"], "float32")[0] for path in layers],
        num_experts=[layer.num_experts for layer in layers.values()],
        by_token=by_token,
    )
    if to_file is not None:
        routing.save(to_file)
    return routing


def _checked(to_file: str | Path) -> Path:
    to_file = Path(to_file)
    if to_file.suffix not in (".png", ".svg", ".pdf"):
        raise ValueError(f"Expected a file .png, .svg or .pdf, received {to_file}.")
    return to_file


def _import_figure() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError(
            "A picture of the routing needs matplotlib, which is not installed. Install it: "
            "pip install matplotlib."
        ) from None
    return Figure


def _axes(width: float, routing: Routing) -> tuple[Figure, Any]:
    height = 0.24 * len(routing.paths)
    figure = _import_figure()(figsize=(width + 2.4, height + 1.6), layout="constrained")
    axes = figure.add_subplot(ylabel="layer")
    step = 1 if height < 12 else 4
    names = [_layer_name(path) for path in routing.paths]
    axes.set_yticks(range(0, len(names), step), names[::step], fontsize=8)
    return figure, axes


def _layer_name(path: str) -> str:
    """Returns the number of a decoder layer, or the path of something else."""
    name = path.partition("/")[0]
    return name.removeprefix("decoder_")


def _draw_shares(routing: Routing) -> Figure:
    shares = routing.shares
    figure, axes = _axes(min(max(4.0, 0.12 * shares.shape[1]), 16.0), routing)
    image = axes.imshow(shares, aspect="auto", cmap="magma_r", vmin=0, interpolation="nearest")
    axes.set_xlabel("expert")
    axes.xaxis.get_major_locator().set_params(integer=True)
    figure.colorbar(image, ax=axes, label="share of the choices")
    even = ", ".join(f"{1 / x:.3g}" for x in sorted(set(routing.num_experts), reverse=True))
    chosen = ", ".join(map(str, sorted({x.shape[1] for x in routing.experts})))
    axes.set_title(f"{len(routing.tokens)} tokens, {chosen} experts each; even: {even}", fontsize=9)
    return figure


def _draw_tokens(routing: Routing) -> Figure:
    count = len(routing.tokens)
    if count > _MOST_TOKENS:
        raise ValueError(
            f"Expected at most {_MOST_TOKENS} tokens for a picture by tokens, received {count}: "
            "take a part of the text, or leave `by_token` out."
        )
    first = np.stack(
        [
            np.take_along_axis(experts, weights.argmax(1)[:, None], 1)[:, 0]
            for experts, weights in zip(routing.experts, routing.weights, strict=True)
        ]
    )
    is_written = count <= _MOST_WRITTEN
    figure, axes = _axes(max(3.0, (0.3 if is_written else 0.12) * count), routing)
    last = max(max(routing.num_experts) - 1, 1)
    image = axes.imshow(
        first, aspect="auto", cmap="turbo", vmin=0, vmax=last, alpha=0.6, interpolation="nearest"
    )
    if is_written:
        for (row, column), expert in np.ndenumerate(first):
            axes.text(column, row, str(expert), ha="center", va="center", fontsize=7)
    # matplotlib takes what stands between two dollars for a formula.
    names = [repr(x)[1:-1].replace("$", r"\$") for x in routing.tokens]
    axes.set_xticks(range(count), names, rotation=90, fontsize=7)
    figure.colorbar(image, ax=axes, label="expert with the largest weight")
    return figure
