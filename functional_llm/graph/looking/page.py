"""A page to click through a graph: one file of HTML, which needs nothing else."""

import html
import json
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from functional_llm.graph.looking.boxes import Box, Level, rows_of
from functional_llm.graph.looking.facts import Weight
from functional_llm.graph.looking.outline import outline
from functional_llm.graph.types import JSON, Layer

_PARTS = Path(__file__).parent / "page"
_HEIGHT = 720  # pixels, in a notebook


class Page:
    """A page of HTML; a notebook shows it where it is the last value of a cell.

    Args:
        html: The whole page.
        path: Where it was written; `None` for nowhere.
    """

    def __init__(self, html: str, path: Path | None = None) -> None:
        self.html = html
        self.path = path

    def __repr__(self) -> str:
        where = "not written to a file" if self.path is None else f"in {self.path}"
        return f"<Page of {len(self.html):,} characters, {where}>"

    def _repr_html_(self) -> str:
        return (
            f'<iframe srcdoc="{html.escape(self.html)}" title="model" loading="lazy" '
            f'style="width: 100%; height: {_HEIGHT}px; border: 0"></iframe>'
        )


def explore(model: Layer, to_file: str | Path | None = None, original: Layer | None = None) -> Page:
    """Writes a page in which the graph of a model can be opened, searched and compared.

    One file of HTML that needs no network. Layers with a graph inside open and close; equal layers
    are drawn once, as by `plot`. Of each layer it shows paths, class, config, shapes, dtypes and
    weights; of a rewired model, also what is other than in the original.

    Args:
        model: A functional model or a built CompositeLayer.
        to_file: The file to write, `.html`; `None` to write none.
        original: The model that this one was rewired from.

    Returns:
        The page. A notebook shows it in place.

    Raises:
        TypeError: If a model has no graph.
        ValueError: If it has none yet, or the file's ending is another.
    """
    path = None if to_file is None else Path(to_file)
    if path is not None and path.suffix not in (".html", ".htm"):
        raise ValueError(f"Expected a file .html, received {path}.")
    page = Page(_html(page_data(model, original)), path)
    if path is not None:
        path.write_text(page.html, encoding="utf-8")
    return page


def page_data(model: Layer, original: Layer | None = None) -> JSON:
    """Returns what the page knows of a model, as JSON.

    Args:
        model: A functional model or a built CompositeLayer.
        original: The model that this one was rewired from.
    """
    root = outline(model, original)
    data: JSON = {"model": _box(root), "beside": None}
    if original is not None:
        trainable = {id(v) for v in original.trainable_variables}
        sizes = {id(v): v for v in original.variables}
        numbers = [(v.shape, key in trainable) for key, v in sizes.items()]
        weights = [Weight("", tuple(shape), "", trains) for shape, trains in numbers]
        data["beside"] = {"name": original.name, "numbers": _numbers(weights)}
    return data


def _html(data: JSON) -> str:
    # In a script, "<" could end it.
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    parts = {"DATA": text}
    parts |= {name: (_PARTS / file).read_text("utf-8") for name, file in _FILES.items()}
    parts["TITLE"] = html.escape(data["model"]["title"])
    template = (_PARTS / "page.html").read_text("utf-8")
    return re.sub(r"/\*\{(\w+)\}\*/", lambda found: parts[found[1]], template)


_FILES = {"STYLE": "page.css", "DRAW": "draw.js", "SCRIPT": "page.js"}


def _box(box: Box) -> JSON:
    """Returns a box as JSON; what is empty is left out."""
    data: JSON = {
        "kind": box.kind,
        "title": box.title,
        "class": "" if box.class_name == "CompositeLayer" else box.class_name,
        "paths": box.paths,
        "times": box.times if box.times > 1 else 0,
        "takes": box.takes,
        "returns": box.returns,
        "change": box.change,
        "lines": box.lines,
        "removed": box.removed,
        "numbers": _numbers(box.weights),
        "quantization": box.quantization,
        "config": box.config,
        "given": box.given,
        "inputs": box.inputs,
        "outputs": box.outputs,
        "formula": box.formula,
    }
    if box.level is None:
        weights = [[w.name, list(w.shape), w.dtype, w.trainable] for w in box.weights]
        return {key: x for key, x in {**data, "weights": weights}.items() if x}
    data["boxes"] = [_box(inner) for inner in box.level.boxes]
    data["arrows"] = [[x.source, x.target, ", ".join(x.specs)] for x in box.level.arrows]
    data["rows"] = arrange(box.level)
    return {key: x for key, x in data.items() if x}


def _numbers(weights: Iterable[Weight]) -> JSON:
    """Returns how many numbers weights have: all, those that train, those of each dtype."""
    dtypes: Counter[str] = Counter()
    trainable = 0
    for weight in weights:
        dtypes[weight.dtype] += weight.size
        trainable += weight.size * weight.trainable
    total = sum(dtypes.values())
    return {"all": total, "trainable": trainable, "dtypes": dict(dtypes)} if total else {}


def arrange(level: Level) -> list[list[int]]:
    """Returns the boxes in rows from top to bottom, so that few arrows cross.

    Args:
        level: The boxes; each comes below all that it takes something of.
    """
    rows = rows_of(level)
    above: list[list[int]] = [[] for _ in rows]
    below: list[list[int]] = [[] for _ in rows]
    for arrow in level.arrows:
        above[arrow.target].append(arrow.source)
        below[arrow.source].append(arrow.target)
    for i in reversed(range(len(rows))):  # what takes nothing stands right above who takes it
        if not above[i] and below[i]:
            rows[i] = min(rows[j] for j in below[i]) - 1
    order = [
        [i for i in range(len(rows)) if rows[i] == row] for row in range(max(rows, default=-1) + 1)
    ]
    for near, lines in ((above, order), (below, order[::-1])) * 2:
        places = _places(order)
        for line in lines:
            line.sort(key=lambda i: _middle([places[j] for j in near[i]], places[i]))
            places |= _places([line])
    return order


def _places(order: list[list[int]]) -> dict[int, float]:
    return {i: (k + 0.5) / len(line) for line in order for k, i in enumerate(line)}


def _middle(places: list[float], own: float) -> float:
    return sum(places) / len(places) if places else own
