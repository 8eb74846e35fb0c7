"""Pictures and pages of models: everything is in them once, and what changed is marked."""

import html
import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import keras
import pytest
from keras import layers, ops

import functional_llm as flm
from configs import CONFIGS
from functional_llm.graph.keras_private import calls
from functional_llm.graph.looking.boxes import Box, span
from functional_llm.graph.looking.changes import find_changes
from functional_llm.graph.looking.outline import outline
from functional_llm.graph.looking.page import Page, page_data
from functional_llm.graph.selection import inner_graph, inner_layers, walk
from nightly import one_of_each_kind
from pair import Pair

LLAMA = CONFIGS["llama_grouped"]
NEEDS_DOT = pytest.mark.skipif(shutil.which("dot") is None, reason="needs Graphviz's program dot")

Make = Callable[..., Any]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """A config with other keys -> a Backbone without weights of its own, made once."""
    made: dict[str, Any] = {}

    def build(config: Any, **keys: Any) -> Any:
        text = json.dumps({**config, **keys})
        if text not in made:
            folder = tmp_path_factory.mktemp("model")
            (folder / "config.json").write_text(text)
            made[text] = flm.Backbone.from_preset(folder, load_weights=False)
        return made[text]

    return build


def titles(box: Box) -> list[str]:
    """The boxes of a level: `name ×times`, and for a block what is in it."""
    shown = []
    for inner in box.level.boxes if box.level else ():
        times = f" ×{inner.times}" if inner.times > 1 else ""
        inside = f"[{' | '.join(x for x in titles(inner) if x)}]" if inner.kind == "block" else ""
        shown.append(f"{inside or inner.title}{times}")
    return shown


def arrows(box: Box) -> set[tuple[str, str]]:
    """The arrows of a level, by the titles of their ends."""
    assert box.level is not None
    boxes = box.level.boxes
    return {(boxes[x.source].title, boxes[x.target].title) for x in box.level.arrows}


def find(box: Box, path: str, title: str = "") -> Box:
    """The box that stands for a path, or the operations there with a title."""
    kind = {"operations"} if title else {"layer", "graph"}
    fits = [x for x in box.walk() if path in x.paths and x.kind in kind]
    return next(x for x in fits if title in ("", x.title))


def model_of(body: Callable[[Any], Any], width: int = 8) -> Any:
    x = keras.Input((width,))
    return keras.Model(x, body(x))


# Everything is there ---------------------------------------------------------------------------


def _count_calls(model: Any) -> int:
    """Layers of graphs at every depth, by their calls."""
    count = 0
    for call in calls(inner_graph(model)):
        if isinstance(call.operation, layers.Layer):
            count += 1
            count += _count_calls(call.operation) if inner_layers(call.operation) else 0
    return count


def _count_boxes(box: Box, times: int) -> int:
    count = 0
    for inner in box.level.boxes if box.level else ():
        all_times = times * inner.times
        count += all_times * (inner.kind in ("layer", "graph")) + _count_boxes(inner, all_times)
    return count


@one_of_each_kind
def test_an_outline_has_every_layer_and_every_call_once(pair: Pair) -> None:
    root = outline(pair.ours)
    paths = [path for box in root.walk() if box.kind in ("layer", "graph") for path in box.paths]
    assert set(paths) - {""} == {path for path, _ in walk(pair.ours, composites=True)}
    assert _count_boxes(root, 1) == _count_calls(pair.ours)
    for box in root.walk():
        boxes = box.level.boxes if box.level else []
        for arrow in box.level.arrows if box.level else ():
            assert arrow.source < arrow.target < len(boxes)
        for inner in boxes:  # nothing reads from nowhere
            is_read = any(boxes[x.target] is inner for x in box.level.arrows) if box.level else 0
            assert inner.kind == "input" or inner.takes or is_read, inner.title
    rows = page_data(pair.ours)["model"]["rows"]
    assert sorted(i for row in rows for i in row) == list(range(len(root.level.boxes)))  # type: ignore[union-attr]


# Equal layers ----------------------------------------------------------------------------------

SLIDES, FULL = "sliding_attention", "full_attention"
GEMMA = CONFIGS["gemma3_two_ropes"]


@pytest.mark.parametrize(
    ("types", "expected"),
    [
        ([FULL] * 4, ["decoder_0–3 ×4"]),
        ([SLIDES, FULL] * 3, ["[decoder_0, 2, 4 | decoder_1, 3, 5] ×3"]),
        (
            [SLIDES, SLIDES, FULL] * 2 + [SLIDES, SLIDES],
            ["[decoder_0–1, 3–4 ×2 | decoder_2, 5] ×2", "decoder_6–7 ×2"],
        ),
        ([FULL, SLIDES, SLIDES], ["decoder_0", "decoder_1–2 ×2"]),
        ([FULL, SLIDES, FULL], ["decoder_0", "decoder_1", "decoder_2"]),
    ],
)
def test_layers_that_alternate(make: Make, types: list[str], expected: list[str]) -> None:
    model = make(GEMMA, num_hidden_layers=len(types), layer_types=types)
    shown = [title for title in titles(outline(model)) if re.match(r"\[?decoder", title)]
    assert shown == expected


def test_blocks_of_plain_keras_layers_fold(tmp_path: Path) -> None:
    def block(x: Any) -> Any:
        y = layers.Dense(16, activation="relu")(layers.LayerNormalization()(x))
        return x + layers.Dense(8)(y)

    def body(x: Any) -> Any:
        for _ in range(5):
            x = block(x)
        return layers.Dense(3)(x)

    model = model_of(body)
    root = outline(model)
    assert [(box.kind, box.times) for box in root.level.boxes] == [  # type: ignore[union-attr]
        ("input", 1),
        ("block", 5),
        ("layer", 1),
    ]
    names = {path for path, _ in walk(model)}
    assert {path for box in root.walk() for path in box.paths} - {""} == names
    flm.plot(model, tmp_path / "blocks.dot")


def test_what_is_read_from_farther_away_does_not_fold() -> None:
    def body(x: Any) -> Any:
        kept = []
        for _ in range(3):
            x = layers.Dense(8)(x)
            kept.append(x)
        for other in reversed(kept):
            x = layers.Add()([x, other])
        return x

    assert all(box.times == 1 for box in outline(model_of(body)).walk())


def test_layers_that_differ_stand_apart(make: Make) -> None:
    model = make(LLAMA, num_hidden_layers=6)
    edits: dict[str, Any] = {
        "a number": lambda x, path: layers.RMSNormalization(epsilon=0.5, name=x.name),
        "a class": lambda x, path: layers.Dense.from_config(x.get_config()),
    }
    for name, where in (("a number", "decoder_3/mlp_norm"), ("a class", "decoder_3/mlp/up")):
        edited = flm.rewire(model, edits[name], where=where)
        shown = [title for title in titles(outline(edited)) if title.startswith("decoder")]
        # A Dense with other values is the same layer, unless the original stands beside it.
        apart = ["decoder_0–2 ×3", "decoder_3", "decoder_4–5 ×2"]
        assert shown == (apart if name == "a number" else ["decoder_0–5 ×6"])
        beside = [title for title in titles(outline(edited, model)) if title.startswith("decoder")]
        assert beside == apart


def test_names_that_count() -> None:
    assert span(["dense"]) == "dense"
    assert span([f"d_{i}" for i in (0, 1, 2, 4, 6, 7)]) == "d_0–2, 4, 6–7"
    assert span(["dense", "dense_1", "dense_2"]) == "dense … dense_2"


# Formulas --------------------------------------------------------------------------------------


def test_operations_are_formulas(make: Make) -> None:
    root = outline(make(LLAMA))
    rotary = "query_heads × rotation.cos + roll(query_heads) × rotation.sin"
    assert find(root, "decoder_0/attention", rotary)
    assert find(root, "decoder_0/mlp", "silu(gate) × up")
    assert find(root, "decoder_0", "(x + attention) + mlp").returns == ["x"]
    assert "rotation" in titles(root)  # as the decoder layers call it
    gemma = outline(make(GEMMA))
    assert find(gemma, "decoder_0", "attention_norm + rms_norm(x)")


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (lambda x: (x + 1.0) * 2.0, "(input + 1) × 2"),
        (lambda x: x - (x - x), "input - (input - input)"),
        (lambda x: -x / 3.0, "-input / 3"),
        (lambda x: ops.concatenate([x[:, 2:], x[:, :2]], -1), None),
        (lambda x: x[..., ::2] @ ops.ones((4, 3)), "input[..., ::2] @ constant(4, 3)"),
        (lambda x: ops.relu6(ops.rms_normalization(x)), "relu6(rms_norm(input))"),
    ],
)
def test_formulas(body: Any, expected: str | None) -> None:
    (box,) = (x for x in outline(model_of(body)).walk() if x.kind == "operations")
    assert box.title == (expected or "concatenate(input[:, 2:], input[:, :2])")


def test_long_chains_of_operations_take_no_time() -> None:
    def body(x: Any) -> Any:
        for _ in range(60):  # each value is used twice: formulas written out would double 60 times
            x = layers.Identity()(x) + x * 2.0
        return x

    outline(model_of(body))


# Arrows ----------------------------------------------------------------------------------------


def test_inputs_stand_beside_what_uses_them(make: Make) -> None:
    model = make(LLAMA, num_hidden_layers=6)
    lora = flm.peft.lora(model, rank=2, targets="decoder_3/attention/query")
    root = outline(lora, model)
    assert not [box for box in root.level.boxes if box.kind == "input"]  # type: ignore[union-attr]
    assert find(root, "full_attention_mask").takes == [
        "in_order",
        "mask",
        "positions",
        "segment_ids",
    ]
    into_last = {source for source, target in arrows(root) if target == "decoder_4–5"}
    assert into_last == {"decoder_3"}  # the mask is named there
    assert {"full_attention_mask", "rotation", "cache"} <= {*find(root, "decoder_4").takes}
    attention = find(root, "decoder_0/attention")
    assert ("x", "query") in arrows(attention)
    assert find(attention, "decoder_0/attention/dot_product").takes == ["mask"]


def test_a_parallel_layer_keeps_its_three_branches(make: Make) -> None:
    decoder = find(outline(make(CONFIGS["gpt_neox_five_heads"])), "decoder_0")
    last = "x + attention + mlp"
    assert {("x", last), ("attention", last), ("mlp", last)} <= arrows(decoder)


# What changed ----------------------------------------------------------------------------------


def _changes(model: Any, beside: Any) -> dict[str, list[str]]:
    """Path of each new or changed layer -> what is said of it."""
    found = find_changes(model, beside)
    return {
        path: found.lines.get(path, []) for path, kind in found.kinds.items() if kind != "inside"
    }


def test_changes_of_an_adapter(make: Make) -> None:
    model = make(LLAMA)
    lora = flm.peft.lora(model, rank=2)
    found = _changes(lora, model)
    assert {*found} == {f"decoder_{i}/attention/{x}" for i in (0, 1) for x in ("query", "value")}
    lines = found["decoder_0/attention/query"]
    assert lines[0] == "Dense → LoRA" and "+ lora_a 48 × 2 float32" in lines
    assert not any("kernel" in line for line in lines)  # it is shared
    merged = flm.peft.merge(lora)
    assert _changes(merged, model)["decoder_1/attention/value"] == ["other values: kernel"]
    assert _changes(model, model) == {} and find_changes(model, None).kinds == {}


def test_changes_of_quantising(make: Make) -> None:
    model = make(LLAMA)
    root = outline(flm.quantize(model, "int8"), model)
    box = find(root, "decoder_0/mlp/up")
    assert box.quantization == "int8" and box.change == "changed"
    assert "+ kernel 48 × 80 int8" in box.lines and "- kernel 48 × 80 float32" in box.lines


def test_changes_of_calls_and_of_what_is_gone(make: Make) -> None:
    model = make(LLAMA)

    def twice(layer: Any, path: str, x: Any, **kwargs: Any) -> Any:
        return layer(x, **kwargs) * 2.0

    louder = outline(flm.rewire(model, call=twice, where="decoder_1/mlp"), model)
    assert find(louder, "decoder_1", "(x + attention) + mlp × 2").change == "changed"
    assert find(louder, "decoder_1").removed == ["(x + attention) + mlp"]
    assert find(louder, "decoder_1").change == "inside" and find(louder, "decoder_0").change == ""

    without = flm.rewire(model, call=lambda layer, path, x, **_: x, where="decoder_1/mlp")
    found = find_changes(without, model)
    assert "mlp" in found.removed["decoder_1"] and found.kinds["decoder_1"] == "inside"
    assert "- mlp" in flm.tree_view(without, original=model)


def test_changes_of_a_config_and_of_connections() -> None:
    def body(x: Any, swapped: bool) -> Any:
        a = layers.Identity(name="a")(x)
        b = layers.Identity(name="b")(layers.ReLU(negative_slope=0.1 + swapped, name="r")(a))
        return layers.Identity(name="c")(a if swapped else b) + b

    found = _changes(*(model_of(partial(body, swapped=swapped)) for swapped in (True, False)))
    assert found == {"r": ["negative_slope: 0.1 → 1.1"], "c": ["takes a, not b"]}


def test_models_that_share_no_weights_are_compared_by_shape(make: Make, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, "intermediate_size": 96}))
    other = flm.Backbone.from_preset(tmp_path, load_weights=False)
    found = _changes(other, make(LLAMA))
    assert {path.split("/")[-1] for path in found} == {"gate", "up", "down"}
    assert "+ kernel 48 × 96 float32" in found["decoder_0/mlp/up"]


def test_a_layer_at_another_place_is_known_by_its_weights() -> None:
    dense = layers.Dense(8, name="dense")
    before = model_of(dense)
    inner = keras.Sequential([keras.Input((8,)), dense], name="inner")
    found = find_changes(model_of(inner), before)
    assert found.kinds == {"inner": "added", "inner/dense": "added"}
    assert found.lines["inner/dense"] == ["has the weights of dense"]
    assert found.removed == {"": ["dense"]}


# Pictures --------------------------------------------------------------------------------------


def _svg_width(path: Path) -> float:
    found = re.search(r'<svg width="([\d.]+)pt"', path.read_text(encoding="utf-8"))
    assert found is not None
    return float(found[1]) * 96 / 72


@NEEDS_DOT
def test_pictures_fit_a_screen(make: Make, tmp_path: Path) -> None:
    model = make(LLAMA, num_hidden_layers=30)
    lora = flm.peft.lora(model, rank=2, targets=["decoder_3/**/query", "decoder_7/**/query"])
    gemma = make(GEMMA, num_hidden_layers=12, layer_types=[SLIDES, FULL] * 6)
    for name, drawn in {
        "closed": flm.plot(model, tmp_path / "a.svg", depth=0),
        "open": flm.plot(model, tmp_path / "b.svg", depth=9),
        "shapes": flm.plot(model, tmp_path / "c.svg", depth=9, shapes=True),
        "adapted": flm.plot(lora, tmp_path / "d.svg", depth=2, original=model),
        "alternating": flm.plot(gemma, tmp_path / "e.svg"),
    }.items():
        assert _svg_width(drawn) < 1600, name
    assert "×30" in (tmp_path / "b.svg").read_text(encoding="utf-8")
    assert "int32" in (tmp_path / "c.svg").read_text(encoding="utf-8")
    assert flm.plot(model, tmp_path / "c.png").read_bytes()[:4] == b"\x89PNG"


def test_plot_marks_what_changed(make: Make, tmp_path: Path) -> None:
    model = make(LLAMA)
    lora = flm.peft.lora(model, rank=2, targets="decoder_1/attention/query")
    dot = flm.plot(lora, tmp_path / "a.dot", depth=2, original=model).read_text(encoding="utf-8")
    assert dot.count('fillcolor="#ffd58a"') == 1  # the query of decoder_1
    assert dot.count('fillcolor="#fff3d6"') == 2  # its attention, its decoder
    assert "LoRA" in dot and "other than in the original" in dot
    same = flm.plot(model, tmp_path / "b.dot", original=model).read_text(encoding="utf-8")
    assert "the same as the original" in same and "#ffd58a" not in same


def test_plot_opens_what_is_asked_for(make: Make, tmp_path: Path) -> None:
    model = make(LLAMA)
    closed = flm.plot(model, tmp_path / "a.dot", depth=0).read_text(encoding="utf-8")
    opened = flm.plot(model, tmp_path / "a.dot", depth=0, open="decoder_1/mlp").read_text("utf-8")
    assert "mlp_norm" not in closed and "gate" in opened and "query" not in opened
    with pytest.raises(ValueError, match="No layer with a graph inside matches 'mpl'.*decoder_0"):
        flm.plot(model, tmp_path / "a.dot", open="mpl")


def test_pictures_that_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(layers.Dense(2))
    with pytest.raises(ValueError, match="received .*picture.gif"):
        flm.plot(model, tmp_path / "picture.gif")
    with pytest.raises(ValueError, match=r"Expected a file .html, received .*page.txt"):
        flm.explore(model, tmp_path / "page.txt")
    monkeypatch.setenv("PATH", str(tmp_path))
    flm.plot(model, tmp_path / "a.dot")
    with pytest.raises(ImportError, match="Graphviz's program `dot`"):
        flm.plot(model, tmp_path / "a.svg")
    monkeypatch.setitem(sys.modules, "pydot", None)
    with pytest.raises(ImportError, match="pip install pydot"):
        flm.plot(model, tmp_path / "a.dot")


class Own(flm.CompositeLayer):
    """A graph with a weight of its own."""

    def functional_build(self, inputs: Any) -> Any:
        self.scale = self.add_weight(inputs.shape[-1:], name="scale")
        return inputs * self.scale


class Wraps(layers.Layer):
    """A layer without a config."""

    def __init__(self, fn: Any) -> None:
        super().__init__()
        self.fn = fn

    def call(self, x: Any) -> Any:
        return self.fn(x)


class WithoutConfig(layers.Layer):
    """A layer whose config is none."""

    def call(self, x: Any) -> Any:
        return x * 2

    def get_config(self) -> Any:
        return None


@NEEDS_DOT
def test_any_graph_can_be_looked_at(make: Make, tmp_path: Path) -> None:
    shared = keras.Sequential([keras.Input((8,)), layers.Dense(8)], name="shared")
    a, b = keras.Input((8,), name="a"), keras.Input((8,), name="b")
    backbone = make(LLAMA)
    models = [
        keras.Sequential([keras.Input((8,)), layers.Dense(8), layers.ReLU()]),
        model_of(lambda x: shared(shared(x)) + 1.0),
        keras.Model({"a": a, "b": b}, {"p": shared(a) + shared(b), "q": [shared(a), a]}),
        model_of(lambda x: x),
        model_of(Own(name='w<b>"&{}|\\')),
        model_of(Wraps(lambda x: x * 2)),
        model_of(WithoutConfig()),
        backbone.get_layer("decoder_0"),
        flm.capture(backbone, "decoder_*"),
    ]
    for model in models:
        for drawn in (
            flm.plot(model, tmp_path / "a.dot", depth=9, shapes=True, original=model),
            flm.explore(model, tmp_path / "a.html").path,
        ):
            assert drawn is not None and drawn.stat().st_size > 100
        done = subprocess.run(
            ["dot", "-Tsvg", tmp_path / "a.dot"], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0 and "Error" not in done.stderr, done.stderr


# Pages -----------------------------------------------------------------------------------------


def _data(page: Page) -> Any:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page.html, re.S)
    assert found is not None
    return json.loads(found[1])


def test_a_page_holds_its_data_and_asks_for_nothing(make: Make, tmp_path: Path) -> None:
    model = make(LLAMA, num_hidden_layers=30)
    lora = flm.peft.lora(model, rank={f"decoder_{i}/**": i % 12 + 1 for i in range(30)})
    page = flm.explore(lora, tmp_path / "model.html", original=model)
    assert page.path is not None and page.path.read_text(encoding="utf-8") == page.html
    assert len(page.html) < 1_000_000  # thirty layers, none like its neighbour
    assert len(flm.explore(model).html) < 100_000  # all alike
    assert not re.search(r"""(src|href)=|@import|url\((?!#|`#)|fetch\(|import\(""", page.html)
    assert _data(page) == json.loads(json.dumps(page_data(lora, model)))
    counts = _data(page)["model"]["numbers"]
    assert counts["all"] == sum(math.prod(v.shape) for v in lora.variables)
    assert counts["trainable"] == sum(math.prod(v.shape) for v in lora.trainable_variables)
    assert "/*{" not in page.html


def test_names_cannot_end_the_script() -> None:
    name = "</script><script>alert(1)<!--"
    model = model_of(Own(name=name.replace("/", "|")))
    model.get_layer(index=1)._name = name
    page = flm.explore(model)
    assert page.html.count("<script") == 2 and "<!--" not in page.html.split("<script", 1)[1]


def test_a_notebook_shows_the_page() -> None:
    page = flm.explore(model_of(layers.Dense(2)))
    shown = page._repr_html_()
    source = re.search(r'srcdoc="([^"]*)"', shown)
    assert source is not None and html.unescape(source[1]) == page.html
    assert page.path is None and "not written" in repr(page)


# The guide -------------------------------------------------------------------------------------


@NEEDS_DOT
def test_the_guide_runs(
    repository: Path, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (repository / "docs" / "looking.md").read_text(encoding="utf-8")
    model = make(LLAMA)
    monkeypatch.setattr(flm.Backbone, "from_preset", lambda handle: model)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(compile(block, "docs/looking.md", "exec"), names)
    assert {path.name for path in tmp_path.iterdir()} == {
        "model.html",
        "model.svg",
        "attention.svg",
    }
    pictures = re.findall(r"\]\((pictures/[^)]+)\)", text)
    for picture in (*pictures, "lora_attention.svg"):
        path = repository / "docs" / picture
        assert path.exists() and path.stat().st_size < 250_000, picture
        if path.suffix == ".svg":
            assert _svg_width(path) < 1600
