"""Each thing of Keras's without a public name, in one test that fails when Keras moves it.

All stand on two pages, functional_llm/graph/keras_private.py and keras_values.py: a new version of
Keras is tried here.
"""

import ast
import re
from pathlib import Path
from typing import Any

import jax
import keras
import numpy as np
import pytest
from keras import layers, ops

from functional_llm.graph import keras_private as page
from functional_llm.graph import keras_values as values_page
from functional_llm.graph.composite import CompositeLayer

PAGES = [Path(page.__file__), Path(values_page.__file__)]
PACKAGE = PAGES[0].parents[1]
X = np.linspace(-1, 1, 8).reshape(2, 4).astype("float32")


def model_of(layer: Any) -> Any:
    x = keras.Input((4,), name="x")
    return keras.Model(x, layer(x))


# Graphs.


def test_calls_are_those_of_the_graph_in_order() -> None:
    x = keras.Input((4,), name="x")
    first, add = layers.Dense(4, name="first"), layers.Add(name="add")
    y = first(x)
    z = add([y, first(y)])
    keras.Model(x, first(z))  # another graph: its call is not one of this
    calls = list(page.calls(keras.Model(x, z)))
    assert [call.operation for call in calls] == [first, first, add]
    assert calls[0].args[0] is x and calls[0].outputs[0] is y
    assert calls[2].inputs[0] is y and calls[2].args[0][0] is y and calls[2].outputs == [z]
    assert calls[2].with_tensors({id(y): 1, id(calls[1].outputs[0]): 2}) == (([1, 2],), {})
    assert calls[2].with_tensors({id(y): 1}) == (([1, None],), {})


def test_calls_have_the_other_arguments() -> None:
    x = keras.Input((4,), name="x")
    y = layers.Dropout(0.5)(x, training=True)
    (call,) = page.calls(keras.Model(x, y))
    assert call.with_tensors({id(x): X})[1] == {"training": True}


def test_a_recorded_call_is_in_the_graph_and_was_not_traced() -> None:
    class Counts(layers.Layer):
        traced = 0

        def call(self, x: Any) -> Any:
            type(self).traced += 1
            return x * 2

    x, layer = keras.Input((4,), name="x"), Counts()
    (y,) = page.record_call(layer, (x,), {}, [keras.KerasTensor((None, 4), "float32")])
    assert Counts.traced == 0 and "compute_output_spec" not in vars(layer)
    np.testing.assert_array_equal(keras.Model(x, y)(X), 2 * X)


def test_optional_inputs_are_known_by_their_tensors() -> None:
    x = keras.Input((4,), optional=True)
    others = [keras.Input((4,)), x + 1.0, keras.KerasTensor((2,))]
    assert [page.is_optional_input(t) for t in (x, *others)] == [True, False, False, False]


def test_masks_are_found_on_symbolic_tensors_and_on_arrays() -> None:
    ids = np.array([[1, 2, 0]])
    embedding = layers.Embedding(5, 1, mask_zero=True)
    np.testing.assert_array_equal(page.mask_of(embedding(ids)), ids > 0)
    assert page.mask_of(embedding(keras.Input((3,), dtype="int32"))) is not None
    assert page.mask_of(ops.ones((2,))) is None and page.mask_of(keras.Input((3,))) is None


def test_a_functional_model_is_made_without_the_constructor_of_its_class() -> None:
    class Mine(keras.Model):
        made = 0

        def __init__(self, inputs: Any, outputs: Any) -> None:
            super().__init__(inputs, outputs)
            type(self).made += 1

    x = keras.Input((4,), name="x")
    y = layers.Dense(3)(x)
    Mine(x, y)
    new = page.make_functional(Mine, {"x": x}, {"y": y}, "mine")
    assert type(new) is Mine and new.name == "mine" and Mine.made == 1
    assert new({"x": X})["y"].shape == (2, 3) and len(new.weights) == 2
    stock = type(keras.Model(x, y))
    assert type(page.make_functional(stock, x, y)) is stock


# The state of layers.


def test_a_copy_shares_all_but_the_state_of_each() -> None:
    layer = layers.Dense(3, kernel_regularizer="l2", activity_regularizer="l2")
    model_of(layer)
    layer(X)
    new = layers.Dense.__new__(layers.Dense)
    page.share_state(layer, new)
    assert vars(new).keys() == vars(layer).keys()
    for name in page._STATE_OF_EACH:
        assert vars(new)[name] is not vars(layer)[name], name
    assert new.kernel is layer.kernel and new.variables == layer.variables
    assert layer.losses and len(new.losses) < len(layer.losses)
    nodes = len(layer._inbound_nodes)
    model_of(new)
    assert len(layer._inbound_nodes) == nodes and len(new._inbound_nodes) == 1
    shared = {
        key
        for key, x in vars(layer).items()
        if isinstance(x, (list, set, dict)) and vars(new)[key] is x
    }
    # Of calls, none of these says anything. What Keras adds may: then it belongs on the page.
    of_class = {"_call_context_args", "_call_has_context_arg", "call_signature_parameters"}
    of_state = {"_layers", "_metrics", "_seed_generators", "_build_shapes_dict"}
    assert shared == of_class | of_state | {"_trainable_variables", "_non_trainable_variables"}
    for wrapper in (new.build, new.quantize):  # which `__new__` has made around the class's own
        assert any(cell.cell_contents is new for cell in wrapper.__closure__)


def test_methods_among_the_attributes_are_bound_to_the_copy() -> None:
    layer, new = layers.Dense(3), layers.Dense.__new__(layers.Dense)
    page.set_untracked(layer, "bound", layer.get_config)
    page.share_state(layer, new)
    assert vars(new)["bound"].__self__ is new


def test_an_attribute_is_set_past_the_tracking() -> None:
    layer = layers.Dense(3)
    layer.build((None, 4))
    with pytest.raises(ValueError, match="cannot add new elements of state"):
        layer.extra = layers.Dense(2)
    page.set_untracked(layer, "extra", layers.Dense(2))
    assert isinstance(layer.extra, layers.Dense) and len(layer.variables) == 2


def test_exchanged_variables_are_used_and_tracked() -> None:
    layer = layers.Dense(3)
    layer.build((None, 4))
    own = keras.Variable(np.ones(3, "float32"), name="own")
    new = layers.Dense.__new__(layers.Dense)
    page.share_state(layer, new)
    page.exchange_variables(new, {id(layer.bias): own})
    np.testing.assert_allclose(np.asarray(new(X) - layer(X)), 1, atol=1e-6)
    assert [id(v) for v in new.trainable_variables] == [id(layer.kernel), id(own)]
    assert layer.bias is not own and id(own) not in map(id, layer.variables)


def test_a_layer_is_frozen_and_its_variables_are_not() -> None:
    layer = layers.Dense(3)
    layer.build((None, 4))
    page.freeze_layer_only(layer)
    assert layer.trainable is False and layer.get_config()["trainable"] is False
    assert layer.kernel.trainable and layer.trainable_variables == []


def test_quantized_matrix_is_the_integers() -> None:
    layer = layers.Embedding(5, 4)
    layer.build(None)
    layer.quantize("int8")
    assert page.quantized_matrix(layer) is next(v for v in layer.weights if v.dtype == "int8")


def test_a_copy_of_a_state_is_tracked_as_the_original_is() -> None:
    layer = layers.Dense(3, name="dense")
    layer.mine = [layers.Dropout(0.5, seed=1), {"x": 3}]
    layer.build((None, 4))
    new = layers.Dense.__new__(layers.Dense)
    memo: dict[int, Any] = {}

    def copied(value: Any) -> Any:
        if isinstance(value, keras.Variable):
            return memo.setdefault(id(value), page.copy_variable(value, {}))
        if isinstance(value, layers.Layer):
            return memo.setdefault(id(value), type(value).from_config(value.get_config()))
        return [copied(x) for x in value] if isinstance(value, list) else value

    page.copy_state(layer, new, copied)
    assert new.kernel is memo[id(layer.kernel)] and new.kernel in new.trainable_variables
    assert new.mine[0] is memo[id(layer.mine[0])] and len(new.variables) == len(layer.variables)
    np.testing.assert_array_equal(new(X), layer(X))
    new.kernel.assign(np.zeros((4, 3)))
    assert np.abs(np.array(layer(X))).max() > 0
    new.mine.append(new.mine[0])
    with pytest.raises(ValueError, match="You cannot add new elements of state"):
        new.mine.append(layers.Dense(3))
    assert new._inbound_nodes == [] and new.build.__closure__[0].cell_contents is new


def test_a_copy_of_a_variable_has_a_value_of_its_own() -> None:
    variable = keras.Variable(np.ones(3), name="v", trainable=False)
    new = page.copy_variable(variable, {})
    variable.assign(np.zeros(3))
    np.testing.assert_array_equal(new, np.ones(3))
    assert (new.name, new.path, new.trainable) == (variable.name, variable.path, False)


# Where calls fail.


class Fails(layers.Layer):
    def call(self, x: Any) -> Any:
        raise ValueError("boom")


@pytest.mark.parametrize("filtering", [True, False])
def test_the_operation_that_failed_is_in_the_traceback(filtering: bool) -> None:
    layer = Fails()
    x = keras.Input((4,))
    if not filtering:
        keras.config.disable_traceback_filtering()
    try:
        for call in (lambda: layer(X), lambda: layer(x), lambda: layers.Dense(3)(np.ones(2))):
            with pytest.raises(ValueError) as error:
                call()
            found = page.failed_operation(error.value)
            assert found is layer or isinstance(found, layers.Dense)
    finally:
        keras.config.enable_traceback_filtering()
    assert page.failed_operation(ValueError()) is None


def test_a_recursive_clone_is_seen_from_inside() -> None:
    seen: list[bool] = []

    class Sees(layers.Layer):
        def compute_output_spec(self, x: Any) -> Any:
            seen.append(page.in_recursive_clone())
            return keras.KerasTensor(x.shape, x.dtype)

    model = model_of(Sees())

    def call(layer: Any, *args: Any, **kwargs: Any) -> Any:
        return layer(*args, **kwargs)

    keras.models.clone_model(model)
    keras.models.clone_model(model, recursive=True)
    keras.models.clone_model(model, call_function=call)
    assert not any(seen)
    keras.models.clone_model(model, call_function=call, recursive=True)
    keras.models.clone_model(model, clone_function=lambda layer: Sees(), recursive=True)
    assert seen[4:] == [True, True]


# Arguments and attributes.


class ByKeras(layers.Layer):
    """Keras records the arguments of its constructor."""

    def __init__(self, units: Any, use_bias: bool = True) -> None:
        super().__init__()


def test_arguments_are_recorded_and_copied() -> None:
    layer = ByKeras(3, use_bias=False)
    assert page.recorded_arguments(layer) == {"units": 3, "use_bias": False}
    assert page.recorded_arguments(ByKeras(keras.Variable(1.0))) is None
    other = ByKeras(5)
    page.copy_recorded_arguments(layer, other)
    assert other.get_config()["units"] == 3


# With torch, tests/test_composite.py::test_torch sees whether `own_attributes` finds layers.
def test_keras_sets_no_attributes_on_layers_that_look_like_a_users() -> None:
    layer = CompositeLayer([layers.Dense(4, activity_regularizer="l2")])
    names = page.names_on_layer(CompositeLayer(name="any"))
    model = model_of(layer)
    model.compile("sgd", "mse")
    model.fit(X, X, verbose=0)
    layer.trainable = False
    assert layer.losses is not None and layer.count_params() and layer.get_config()
    layer.dtype_policy = keras.DTypePolicy("bfloat16")
    assert page.own_attributes(layer, names) == {}
    layer.mine = 3
    assert page.own_attributes(layer, names) == {"mine": 3}


def test_keras_sets_no_attributes_on_models_that_look_like_a_users() -> None:
    model = model_of(layers.Dense(1))
    model.compile("adam", "mse", metrics=["mae"])
    data = np.ones((4, 4)), np.ones((4, 1))
    model.fit(*data, validation_data=data, verbose=0)
    model.evaluate(*data, verbose=0)
    model.predict(data[0], verbose=0)
    assert page.own_attributes(model, page.names_on_every_model()) == {}


def test_metrics_are_those_of_the_layer_itself() -> None:
    layer = layers.Layer()
    layer.inner, layer.metric = layers.Layer(), keras.metrics.Mean()
    layer.inner.metric = keras.metrics.Mean()
    assert page.own_metrics(layer) == [layer.metric] and len(layer.metrics) == 2


def test_inputs_are_optional_or_not() -> None:
    x = keras.Input((4,), optional=True)
    clone = keras.models.clone_model(keras.Model(x, layers.Identity()(x)))
    assert page.is_optional_input(x) and not page.is_optional_input(clone.input)
    page.make_optional(clone.input)
    assert page.is_optional_input(clone.input)
    page.make_optional(clone.output)  # which comes from no Input


# Variables.


def test_optimizers_count_batches_and_keep_sums() -> None:
    optimizer = keras.optimizers.SGD(1.0, gradient_accumulation_steps=3)
    variable = keras.Variable(np.zeros(2, "float32"))
    optimizer.build([variable])
    for _ in range(2):
        optimizer.apply([ops.ones(2)])
    batches, sums = page.accumulation_variables(optimizer)
    assert int(batches.value) == 2
    assert [x.numpy().tolist() for x in sums] == [[2.0, 2.0]]
    assert page.accumulation_variables(keras.optimizers.SGD(1.0))[1] == []


def test_values_are_kept_when_a_step_fails() -> None:
    model = model_of(layers.Dense(4))
    model.compile("sgd", "mse")
    before = [np.array(v) for v in model.variables]

    class Stops(keras.callbacks.Callback):
        def on_predict_batch_end(self, batch: int, logs: Any = None) -> None:
            raise KeyError

    for keeps in (True, False):  # the second time as Keras does it
        with pytest.raises(KeyError):
            if keeps:
                with values_page.kept_values(model):
                    model.predict(X, verbose=0, callbacks=[Stops()])
            else:
                model.predict(X, verbose=0, callbacks=[Stops()])
        assert (model.variables[0]._value is None) is not keeps
        if keeps:
            for old, variable in zip(before, model.variables, strict=True):
                np.testing.assert_array_equal(variable, old)
    assert "_get_jax_state" not in vars(model)


def test_steps_do_not_write_into_what_they_do_not_change() -> None:
    model = model_of(layers.Dense(4, trainable=False))
    outputs = layers.Dense(4)(layers.Dropout(0.5, seed=0)(model.output))
    model = keras.Model(model.input, outputs)
    model.compile("sgd", "mse")
    with values_page.donating(0, 2, 3):
        model.make_train_function()
    kernel, seed = model.layers[1].kernel.value, model.layers[2].seed_generator.state.value
    trained = model.layers[3].kernel.value
    assert kernel.shape == (4, 4)
    model.fit(X, X, verbose=0)
    assert model.layers[1].kernel.value is kernel and not kernel.is_deleted()
    assert trained.is_deleted() and not np.array_equal(model.layers[2].seed_generator.state, seed)
    with values_page.donating():
        model.make_predict_function()
        model.make_test_function()
    step = values_page.StepOfGroups(model.train_step, (0, 2, 3))
    assert step == values_page.StepOfGroups(model.train_step, (0, 2, 3))  # one program for JAX
    assert step.split(([1], [2], [3], [4])) == (([1], None, [3], [4]), (None, [2], None, None))
    now = model.layers[3].kernel.value
    model.predict(X, verbose=0)
    model.evaluate(X, X, verbose=0)
    assert model.layers[3].kernel.value is now and not now.is_deleted()


def test_variables_are_made_without_values_and_forgotten() -> None:
    layer = layers.Dense(3)
    with values_page.uninitialized():
        layer.build((None, 4))
    assert layer.kernel._value is None and layer.kernel._initializer is values_page.no_value
    with keras.StatelessScope():  # at its end, Keras initialises those that it remembers
        layers.Dense(3).build((None, 4))
    assert layer.kernel._value is None and not values_page.has_value(layer.kernel)
    layer.kernel.assign(np.ones((4, 3)))
    assert values_page.has_value(layer.kernel)
    np.testing.assert_array_equal(layer.kernel, np.ones((4, 3)))


def test_a_variable_says_where_it_lies() -> None:
    mesh = keras.distribution.DeviceMesh((1,), ["a"], keras.distribution.list_devices()[:1])
    places = keras.distribution.LayoutMap(mesh)
    places[".*/kernel"] = (None, "a")
    with keras.distribution.ModelParallel(layout_map=places, batch_dim_name="a").scope():
        layer = layers.Dense(3)
        layer.build((None, 4))
        optimizer = keras.optimizers.Adam()
        optimizer.build(layer.trainable_variables)
        specs = {
            v.name: values_page.sharding_of(v).spec  # type: ignore[attr-defined]
            for v in (*layer.variables, *optimizer.variables)
        }
    split = jax.sharding.PartitionSpec(None, "a")
    assert specs["kernel"] == split != specs["bias"]
    moments = [spec for name, spec in specs.items() if "kernel_" in name]
    assert len(moments) == 2 and set(moments) == {split}  # Keras would find no "kernel" for them


# Nobody else.


def used_names(tree: ast.Module) -> set[str]:
    """Returns the private names that a module uses as attributes, by `getattr` and the like too."""
    names = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr"):
            names |= {str(x.value) for x in node.args if isinstance(x, ast.Constant)}
    return {name for name in names if is_private(name)}


def is_private(name: object) -> bool:
    return isinstance(name, str) and re.fullmatch(r"_[a-z]\w*", name) is not None


def defined_names(tree: ast.Module) -> set[str]:
    """Returns the names of the functions, classes and attributes that a module defines."""
    functions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    names = {node.name for node in ast.walk(tree) if isinstance(node, functions)}
    for node in ast.walk(tree):
        if isinstance(node, (ast.Name, ast.Attribute)) and isinstance(node.ctx, ast.Store):
            names.add(node.id if isinstance(node, ast.Name) else node.attr)
    return names


def find_private(tree: ast.Module, names: set[str]) -> list[str]:
    """Returns "line: what" of what only the page may do.

    That is: to import `keras.src`, to use one of the names, to write past a setter.
    """
    found = []
    for node in ast.walk(tree):
        what = ""
        if isinstance(node, ast.Import):
            what = next((x.name for x in node.names if x.name.startswith("keras.src")), "")
        elif isinstance(node, ast.ImportFrom):
            imported = [f"{node.module}.{alias.name}" for alias in node.names]
            what = next((x for x in imported if x.startswith("keras.src")), "")
        elif isinstance(node, ast.Attribute):
            is_source = ast.unparse(node) == "keras.src"
            what = node.attr if node.attr in names or is_source else ""
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            what = node.value if node.value in names else ""
        elif isinstance(node, ast.Subscript) and not isinstance(node.ctx, ast.Load):
            target = ast.unparse(node.value)
            what = target if target.startswith("vars(") or target.endswith(".__dict__") else ""
        if what and isinstance(node, (ast.stmt, ast.expr)):
            found.append(f"{node.lineno}: {what}")
    return found


def test_only_the_page_touches_private_keras() -> None:
    trees = {path: ast.parse(path.read_text("utf-8")) for path in sorted(PACKAGE.rglob("*.py"))}
    page_tree = ast.Module([x for path in PAGES for x in trees.pop(path).body], [])
    # What no module here defines belongs to somebody else: to Keras, but for these.
    # Named tuples; `datasets`, which says it nowhere else; `os`.
    of_others = {"_replace", "_ex_iterable", "_exit"}
    of_jax = set().union(*(used_names(x) for path, x in trees.items() if "xla" in path.parts))
    own = set().union(*map(defined_names, trees.values()))
    foreign = set().union(*map(used_names, trees.values())) - own - of_others - of_jax
    on_page = {x.value for x in ast.walk(page_tree) if isinstance(x, ast.Constant)}
    private = used_names(page_tree) | {str(x) for x in on_page if is_private(x)} | foreign
    private |= {"fill_in", "is_input", "keras_tensors"}
    found = [
        f"{path.relative_to(PACKAGE)}:{line}: expected it in graph/keras_private.py"
        for path, tree in trees.items()
        for line in find_private(tree, private)
    ]
    assert "\n".join(found) == ""


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("import keras.src.backend", ["1: keras.src.backend"]),
        ("def f():\n    from keras.src import tree", ["2: keras.src.tree"]),
        ("from keras import src", ["1: keras.src"]),
        ("keras.src.tree", ["1: src"]),
        ("x._kernel", ["1: _kernel"]),
        ("getattr(x, '_kernel', None)", ["1: _kernel"]),
        ("vars(x)['a'] = 1", ["1: vars(x)"]),
        ("del x.__dict__['a']", ["1: x.__dict__"]),
        ("vars(x)['a']; x.kernel; from keras import tree", []),
    ],
)
def test_the_test_sees(code: str, expected: list[str]) -> None:
    assert find_private(ast.parse(code), {"_kernel"}) == expected


def test_each_part_of_the_page_has_a_test() -> None:
    tests = Path(__file__).read_text("utf-8")
    bodies = [x for path in PAGES for x in ast.parse(path.read_text("utf-8")).body]
    public = [x.name for x in bodies if hasattr(x, "name") and not is_private(x.name)]
    assert [name for name in public if f"page.{name}" not in tests and name != "Call"] == []


def test_what_is_of_each_layer() -> None:
    first, second = layers.Dense(4), layers.Dense(4)
    for layer in (first, second):
        layer(keras.Input((4,)))
    same = {"activation", "units", "use_bias", "built"}
    differ = {name for name, x in vars(first).items() if vars(second)[name] is not x}
    assert {x for x in vars(first) if page.is_of_each(x)} >= {"name", "_inbound_nodes"}
    assert {x for x in vars(first) if page.is_of_each(x)} <= differ
    assert not any(map(page.is_of_each, same))


def test_a_packed_kernel_is_that_of_a_quantized_dense() -> None:
    stock, new = layers.Dense(6), layers.Dense(6)
    stock.build((None, 4))
    stock.quantize("int4")
    packed = page.quantized_matrix(stock)
    page.set_packed_kernel(new, packed, (4, 6))
    assert page.quantized_matrix(new) is packed
    for name in ("_orig_input_dim", "_orig_output_dim", "_is_quantized"):
        assert vars(new)[name] == vars(stock)[name], name


def test_nested_layers_come_in_the_order_of_kerashub() -> None:
    class Block(layers.Layer):
        def __init__(self, **kwargs: Any) -> None:
            super().__init__(**kwargs)
            self.first = layers.Dense(1, name="first")
            self.second = layers.Dense(1, name="second")

    class Outer(layers.Layer):
        def __init__(self) -> None:
            super().__init__()
            self.block = Block(name="block")
            self.last = layers.Dense(1, name="last")

    names = [x.name for x in page.nested_layers(Outer())]
    assert names == ["block", "second", "first", "last"]
