"""What a composite takes and returns: structures, absent and optional inputs, messages."""

import json
import re
from typing import Any

import keras
import numpy as np
import pytest
from keras import InputSpec, layers, tree

from functional_llm.graph.composite import CompositeLayer
from functional_llm.graph.input_specs import make_inputs, specs_of, with_declared
from functional_llm.graph.layer_paths import layer_at, layer_paths
from functional_llm.graph.signature import Signature
from functional_llm.graph.structure_json import decode, encode

X = np.ones((2, 4), "float32")


@keras.saving.register_keras_serializable("test_structure")
class AddIfThere(layers.Layer):
    """A layer with an optional input: x + 10 y, or x."""

    def call(self, inputs: Any) -> Any:
        x, y = inputs
        return x if y is None else x + 10.0 * y

    def compute_output_spec(self, inputs: Any) -> keras.KerasTensor:
        return keras.KerasTensor(inputs[0].shape, self.compute_dtype)


def add(inputs: Any) -> Any:
    return AddIfThere()([inputs["x"], inputs["y"]])


def three_deep() -> CompositeLayer:
    inner = CompositeLayer(add, name="inner")
    middle = CompositeLayer(lambda i: {"out": inner({"x": i["z"][0], "y": i["z"][1]})}, name="mid")
    return CompositeLayer(lambda i: middle({"z": [i["x"], i["y"]]})["out"], name="outer")


def optional_inputs() -> dict[str, Any]:
    return {"x": keras.Input((4,), name="x"), "y": keras.Input((4,), name="y", optional=True)}


# Optional inputs -----------------------------------------------------------------------------


def test_optional_inputs_three_deep_eagerly_and_symbolically():
    outer = three_deep()
    inputs = optional_inputs()
    model = keras.Model(inputs, outer(inputs))
    for call in (outer, model):
        np.testing.assert_array_equal(call({"x": X, "y": X}), 11 * X)
        np.testing.assert_array_equal(call({"x": X, "y": None}), X)
    symbolic = outer({"x": keras.Input((4,)), "y": None})
    assert symbolic.shape == (None, 4) and symbolic.dtype == "float32"


def test_a_graph_in_which_the_optional_input_is_left_out():
    outer = three_deep()
    outer(optional_inputs())
    x = keras.Input((4,))
    model = keras.Model(x, outer({"x": x, "y": None}))
    np.testing.assert_array_equal(model(X), X)
    np.testing.assert_array_equal(model.predict(X, verbose=0), X)


def test_optional_survives_saving(tmp_path):
    inputs = optional_inputs()
    model = keras.Model(inputs, three_deep()(inputs))
    model.save(tmp_path / "m.keras")
    loaded = keras.saving.load_model(tmp_path / "m.keras")
    np.testing.assert_array_equal(loaded({"x": X, "y": X}), 11 * X)
    np.testing.assert_array_equal(loaded({"x": X, "y": None}), X)


@keras.saving.register_keras_serializable("test_structure")
class Declares(CompositeLayer):
    """Graph made inside, of a nested dict; its build config and input_spec must come back."""

    def functional_build(self, inputs: Any) -> Any:
        return {"out": [AddIfThere()([inputs["x"], inputs["rest"][0]["y"]])]}


@pytest.mark.parametrize("by_hand", [True, False])
def test_a_nested_signature_of_a_class_survives(by_hand: bool, tmp_path: Any):
    layer = Declares()
    inputs = optional_inputs()
    if by_hand:
        layer.input_spec = {"x": None, "rest": [{"y": InputSpec(shape=(None, 4), optional=True)}]}
        inputs["y"] = keras.Input((4,), name="y")
    model = keras.Model(inputs, layer({"x": inputs["x"], "rest": ({"y": inputs["y"]},)}))
    model.save(tmp_path / "m.keras")
    loaded = keras.saving.load_model(tmp_path / "m.keras")
    new = [Declares.from_config(layer.get_config()), loaded.layers[-1]]
    new += [keras.models.clone_model(model).layers[-1]] if by_hand else []
    if not by_hand:
        new[0].build_from_config(json.loads(json.dumps(layer.get_build_config())))
    for other in (layer, *new):
        assert other({"x": X, "rest": [{"y": None}]})["out"][0].shape == (2, 4)
        np.testing.assert_array_equal(other({"x": X, "rest": [{"y": X}]})["out"][0], 11 * X)


def test_a_ready_model_keeps_its_signature():
    inputs = optional_inputs()
    layer = CompositeLayer(keras.Model(inputs, {"out": add(inputs)}))
    for other in (layer, CompositeLayer.from_config(layer.get_config())):
        np.testing.assert_array_equal(other({"x": X, "y": None})["out"], X)
        np.testing.assert_array_equal(other({"x": X, "y": X})["out"], 11 * X)
        with pytest.raises(ValueError, match="'x' of .* is required"):
            other({"x": None, "y": X})


def test_the_first_call_is_with_none_and_the_input_stays_absent():
    layer = CompositeLayer(lambda i: i["x"] * 2.0 if i["y"] is None else i["y"])
    np.testing.assert_array_equal(layer({"x": X, "y": None}), 2 * X)
    with pytest.raises(ValueError, match=r"Input 'y' of 'composite.*stays absent.*optional=True"):
        layer({"x": X, "y": X})


def test_none_for_a_whole_subtree():
    def body(i: Any) -> Any:
        return AddIfThere()([i["x"], i["cache"]["k"]])

    x, k = keras.Input((4,)), keras.Input((4,), optional=True)
    layer = CompositeLayer(body)
    layer({"x": x, "cache": {"k": k}})
    np.testing.assert_array_equal(layer({"x": X, "cache": None}), X)
    np.testing.assert_array_equal(layer({"x": X, "cache": {"k": X}}), 11 * X)
    absent = CompositeLayer(lambda i: i["x"] + 1.0)
    absent({"x": X, "cache": None})
    absent({"x": X, "cache": {"k": None}})
    with pytest.raises(ValueError, match="'cache'.*stays absent"):
        absent({"x": X, "cache": {"k": X}})


def spec(optional: bool = False) -> InputSpec:
    return InputSpec(shape=(None, 2), optional=optional)


@pytest.mark.parametrize("kind", ["list", "dict", "list for a dict", "tuple"])
def test_declared_by_hand_as_in_the_seed(kind: str):
    value = np.ones((3, 2), "float32")
    as_dict = "dict" in kind

    def body(i: Any) -> Any:
        return AddIfThere()([i["b"], i["a"]] if as_dict else [i[1], i[0]])

    def pack(a: Any, b: Any) -> Any:
        return {"a": a, "b": b} if as_dict else (a, b) if kind == "tuple" else [a, b]

    for first in (None, value):
        layer = CompositeLayer(body)
        layer.input_spec = (
            {"a": spec(True), "b": spec()} if kind == "dict" else [spec(True), spec()]
        )
        layer(pack(first, value))
        np.testing.assert_array_equal(layer(pack(None, value)), value)
        np.testing.assert_array_equal(layer(pack(value, value)), 11 * value)
        with pytest.raises(ValueError, match="required|should be tensors"):
            layer(pack(value, None))
    # Symbolically, also as the first call.
    layer = CompositeLayer(body)
    layer.input_spec = [spec(True), spec()]
    b = keras.Input((2,))
    model = keras.Model(b, layer(pack(None, b)))
    np.testing.assert_array_equal(model(value), value)


def test_declared_by_hand_for_a_subtree_and_after_from_config():
    def body(i: Any) -> Any:
        return AddIfThere()([i["x"], i["cache"][1]])

    layer = CompositeLayer(body)
    layer.input_spec = {"cache": [spec(True), spec(True)], "x": spec()}
    value = np.ones((3, 2), "float32")
    np.testing.assert_array_equal(layer({"x": value, "cache": None}), value)
    again = CompositeLayer.from_config(layer.get_config())
    np.testing.assert_array_equal(again({"x": value, "cache": [None, value]}), 11 * value)


def test_none_for_a_declared_required_input_at_the_first_call():
    layer = CompositeLayer(add)
    layer.input_spec = {"x": spec(), "y": spec()}
    with pytest.raises(ValueError, match="Input 'x' of .* is required"):
        layer({"x": None, "y": np.ones((3, 2))})
    layer.input_spec = [spec()]
    with pytest.raises(ValueError, match="declares 1 inputs in `input_spec`, received 2"):
        layer({"x": X, "y": X})


def test_none_for_a_required_input_also_inside():
    layer = CompositeLayer(add)
    layer({"x": X, "y": X})
    with pytest.raises(ValueError, match="Input 'y' of .* is required.*received None.*input_spec"):
        layer({"x": X, "y": None})
    with pytest.raises(ValueError, match="is required"):
        layer({"x": keras.Input((4,)), "y": None})
    inner = CompositeLayer(add, name="inner")
    inner({"x": X, "y": X})  # y is required from now on
    outer = CompositeLayer(lambda i: inner(i), name="outer")
    outer(optional_inputs())
    with pytest.raises(ValueError, match="Input 'y' of 'inner' is required"):
        outer({"x": X, "y": None})


def test_no_input_at_all():
    with pytest.raises(ValueError, match="without any input"):
        CompositeLayer(lambda i: i)(None)
    with pytest.raises(ValueError, match="without any input"):
        CompositeLayer(lambda i: i).build(None)


# Structures ----------------------------------------------------------------------------------

NESTED = {"a": X, "b": [X, {"c": X}], "d": (X, [X])}


def test_nested_in_and_out():
    layer = CompositeLayer(lambda i: tree.map_structure(lambda x: x * 2.0, i))
    for _ in range(2):
        outputs = layer(NESTED)
        tree.assert_same_structure(outputs, NESTED)
        np.testing.assert_array_equal(outputs["b"][1]["c"], 2 * X)
    symbolic = layer(tree.map_structure(lambda x: keras.Input(x.shape[1:]), NESTED))
    tree.assert_same_structure(symbolic, NESTED)
    again = CompositeLayer.from_config(json.loads(json.dumps(layer.get_config())))
    tree.assert_same_structure(again(NESTED), NESTED)
    assert type(again(NESTED)["d"]) is tuple


def test_one_output_is_a_tensor_and_a_list_of_one_stays_a_list():
    assert CompositeLayer([layers.Dense(3)])(X).shape == (2, 3)
    for layer in (CompositeLayer(lambda x: [x * 2.0]), CompositeLayer(lambda x: {"y": x * 2.0})):
        for value in (X, keras.Input((4,))):
            outputs = layer(value)
            (only,) = outputs.values() if isinstance(outputs, dict) else outputs
            assert only.shape[-1] == 4
    assert type(CompositeLayer(lambda x: (x * 2.0,))(X)) is tuple
    one = CompositeLayer(lambda x: x[0] * 2.0)
    assert one([X]).shape == (2, 4) and one((X,)).shape == (2, 4)


def test_order_of_keys_does_not_matter_and_inputs_may_be_returned():
    layer = CompositeLayer(lambda i: {"same": i["b"], "difference": i["b"] - i["a"]})
    layer({"b": 3 * X, "a": X})
    outputs = layer({"a": X, "b": 3 * X})
    np.testing.assert_array_equal(outputs["difference"], 2 * X)
    np.testing.assert_array_equal(outputs["same"], 3 * X)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([X, X], "expected a dict with keys ['a', 'b'], received a list of 2"),
        ((X, X), "expected a dict with keys ['a', 'b'], received a tuple of 2"),
        (X, "expected a dict with keys ['a', 'b'], received a ndarray of shape (2, 4)"),
        ({"a": X}, "received a dict with keys ['a']"),
        ({"a": X, "b": [X], "c": X}, "received a dict with keys ['a', 'b', 'c']"),
        ({"a": X, "b": [X, X]}, "Input 'b' of 'it' expected a list or tuple of 1, received a list"),
        ({"a": X, "b": {"0": X}}, "Input 'b' of 'it' expected a list or tuple of 1, received a d"),
        ({"a": [X], "b": [X]}, "Input 'a' of 'it' expected one tensor, received a list of 1"),
        ({"a": X, "b": [X[0]]}, "Input 'b.0' of 'it' expected rank 2 (shape (None, 4)), received"),
        ({"a": X[..., None], "b": [X]}, "Input 'a' of 'it' expected rank 2"),
    ],
)
def test_wrong_structures_are_named(value: Any, message: str):
    layer = CompositeLayer(lambda i: i["a"] + i["b"][0], name="it")
    layer({"a": X, "b": [X]})
    with pytest.raises(ValueError, match=re.escape(message)):
        layer(value)


class First(keras.layers.Layer):
    def call(self, x: Any, y: Any = None) -> Any:
        return x if y is None else x + y


@pytest.mark.parametrize("declared", [False, True])
def test_a_list_of_none_is_no_shape(declared: bool):
    layer = CompositeLayer(lambda i: First()(i["x"], i["cache"][1]))
    if declared:
        optional = keras.InputSpec(shape=(None, 4), optional=True)
        layer.input_spec = {"x": keras.InputSpec(shape=(None, 4)), "cache": [optional, optional]}
    x = keras.Input((4,))
    model = keras.Model(x, layer({"x": x, "cache": [None, None]}))
    np.testing.assert_array_equal(model(X), X)
    np.testing.assert_array_equal(layer({"x": X, "cache": (None, None)}), X)
    if declared:
        np.testing.assert_array_equal(layer({"x": X, "cache": [None, X]}), 2 * X)
    config = layer.get_build_config()
    assert config is not None
    again = CompositeLayer(lambda i: First()(i["x"], i["cache"][1]))
    again.build_from_config(config)
    np.testing.assert_array_equal(again({"x": X, "cache": None}), X)


def test_none_for_every_required_input():
    layer = CompositeLayer(lambda i: i[0] + i[1])
    layer.input_spec = [keras.InputSpec(shape=(None, 4)), keras.InputSpec(shape=(None, 4))]
    with pytest.raises(ValueError, match="Input '0' of .* is required"):
        layer([None, None])


def test_more_than_one_positional_input():
    with pytest.raises(TypeError, match="positional argument"):
        CompositeLayer(lambda i: i)(X, X)  # type: ignore[call-arg]


@pytest.mark.parametrize(("first", "then"), [("int32", "float32"), ("bool", "float32")])
def test_numbers_that_a_cast_would_spoil_are_refused(first: str, then: str):
    layer = CompositeLayer(lambda x: keras.ops.cast(x, "float32"))
    layer(np.ones((2, 4), first))
    with pytest.raises(ValueError, match=f"built for {first}, in which {then} loses digits"):
        layer(np.full((2, 4), 0.5, then))
    layer(np.ones((2, 4), "int64"))  # JAX has no int64 here anyway


def test_token_ids_do_not_become_bfloat16():
    layer = CompositeLayer([layers.Embedding(1000, 2)], dtype="bfloat16")
    layer.build((None, 5))
    with pytest.raises(ValueError, match=r"built for bfloat16.*InputSpec\(shape=..., dtype='int32"):
        layer(np.full((2, 5), 999, "int32"))
    layer = CompositeLayer([layers.Embedding(1000, 2)], dtype="bfloat16")
    layer.build(InputSpec(shape=(None, 5), dtype="int32"))
    assert layer.graph is not None and layer.graph.inputs[0].dtype == "int32"
    layer(np.full((2, 5), 999, "int32"))


# Parts ---------------------------------------------------------------------------------------


def test_structures_are_stored_as_they_are():
    specs = {"a": InputSpec(shape=(None, 2), dtype="int32", optional=True), 3: [None, (spec(),)]}
    stored = json.loads(json.dumps(Signature(specs, ({"y": 0}, [0])).get_config()))
    loaded = Signature.from_config(stored)
    tree.assert_same_structure(loaded.inputs, specs)
    assert loaded.inputs["a"].get_config() == specs["a"].get_config()
    assert loaded.outputs == ({"y": 0}, [0])
    assert decode(json.loads(json.dumps(encode([None, {}, []])))) == [None, {}, []]


def test_specs_of_shapes():
    assert specs_of((None, 4), "float32").shape == (None, 4)
    assert specs_of([None, 4], "float32").shape == (None, 4)  # as JSON gives it
    assert specs_of((), "int32").shape == ()
    assert specs_of((np.int64(2), 4), "float32").shape == (2, 4)
    nested = specs_of({"a": [(None, 4), None], "b": ((2,), spec())}, "int32")
    assert nested["a"][0].dtype == "int32" and nested["a"][1] is None
    assert isinstance(nested["b"], tuple) and nested["b"][1].shape == (None, 2)


def test_declared_wins_only_where_nothing_is_known():
    declared = [InputSpec(ndim=2), InputSpec(ndim=2, optional=True)]
    merged = with_declared([spec(), None], declared, "it")
    assert merged[0].shape == (None, 2) and merged[1] is None
    assert with_declared([spec()], [None], "it")[0].shape == (None, 2)
    assert with_declared(spec(), None, "it").shape == (None, 2)


def test_names_of_inputs_never_meet():
    specs = {"a": {"b": spec()}, "a.b": spec(), "c/d": [spec(), None], "é ": spec()}
    inputs = [x for x in tree.flatten(make_inputs(specs)) if x is not None]
    assert len({x.name for x in inputs}) == 4
    layer = CompositeLayer(lambda i: tree.map_structure(lambda x: x * 2.0, i))
    layer({"a": {"b": X}, "a.b": X, "c/d": X})
    named = ("input", "input_0", "input_x", "x", "keras_tensor")
    chain = CompositeLayer([layers.Dense(4, name=name) for name in named])
    assert chain(X).shape == (2, 4)


def test_paths_of_layers():
    outer = three_deep()
    outer(optional_inputs())
    paths = layer_paths(outer.layers)
    added = outer.get_layer("mid").get_layer("inner").layers[-1]
    assert paths[id(added)][:2] == ("mid", "inner")
    assert layer_at(outer.layers, paths[id(added)]) is added
    assert layer_at(outer.layers, ("mid", "no such")) is None
    with pytest.raises(ValueError, match=r"No layer 'x' in 'outer'. It has: \["):
        outer.get_layer("x")
