"""The loss of a model: equal to the plain one, without the logits of all tokens."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import keras
import numpy as np
import pytest

from configs import CONFIGS
from functional_llm.graph.rewiring import rewire
from functional_llm.presets.backbone import Backbone
from functional_llm.training import (
    REMAT_XLA_FLAG,
    Batches,
    Example,
    LossModel,
    Rows,
    make_schedule,
    pack,
)
from reference import save_reference

FAMILY = "llama_multi_head_tied"  # the head's weights are the embedding's: two gradients add up


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    save_reference(CONFIGS[FAMILY], path)
    return path


@pytest.fixture
def backbone(folder: Path) -> Backbone:
    return Backbone.from_preset(folder)


def _examples(count: int = 9, seed: int = 0) -> list[Example]:
    rng = np.random.default_rng(seed)
    sizes = rng.integers(5, 20, count)
    ids = [rng.integers(0, 128, n).astype("int32") for n in sizes]
    return [Example(x, np.arange(len(x)) >= len(x) // 2) for x in ids]


def _gradients(model: LossModel, batch: Any, training: bool = False) -> tuple[Any, list[Any]]:
    """Returns the loss of a batch and its gradients, compiled as `fit` does."""
    trainable = [v.value for v in model.trainable_variables]
    return jax.jit(jax.value_and_grad(_loss_function(model, batch, training)))(trainable)


def _loss_function(model: LossModel, batch: Any, training: bool = False) -> Any:
    x, y, weights = batch

    def loss(values: list[Any]) -> Any:
        pairs = list(zip(model.trainable_variables, values, strict=True))
        with keras.StatelessScope(state_mapping=pairs):
            y_pred = model(x, training=training)
            return model.compute_loss(x, y, y_pred, weights, training=training)

    return loss


def _plain_loss(backbone: Backbone, batch: Any) -> float:
    x, y, weights = batch
    logits = np.asarray(backbone(x))
    negative = -np.asarray(jax.nn.log_softmax(logits))
    picked = np.take_along_axis(negative, np.maximum(y, 0)[..., None], 2)[..., 0]
    return float((picked * weights).sum() / weights.sum())


@pytest.mark.parametrize("chunk_size", [7, 32, 10_000])
def test_the_loss_is_the_plain_one(backbone: Backbone, chunk_size: int) -> None:
    batch = Batches(pack(_examples(), 32), 3)[0]
    model = LossModel(backbone, chunk_size)
    model.compile("sgd")
    x, y, weights = batch
    logs = model.evaluate(x, y, sample_weight=weights, verbose=0, return_dict=True)
    expected = _plain_loss(backbone, batch)
    assert logs["token_loss"] == pytest.approx(expected, rel=1e-5)
    assert logs["loss"] == pytest.approx(expected, rel=1e-5)


def test_weights_weigh(backbone: Backbone) -> None:
    x, y, weights = Batches(pack(_examples(), 32), 3)[0]
    weights = weights * np.random.default_rng(1).uniform(0, 2, weights.shape).astype("float32")
    loss, _ = _gradients(LossModel(backbone), (x, y, weights))
    assert float(loss) == pytest.approx(_plain_loss(backbone, (x, y, weights)), rel=1e-5)


def test_held_out_loss_is_a_mean_over_tokens_not_batches(backbone: Backbone) -> None:
    batches = Batches(pack(_examples(7), 32, join=False), 3)
    model = LossModel(backbone)
    model.compile("sgd")
    total, count = 0.0, 0.0
    for i in range(len(batches)):
        tokens = float(batches[i][2].sum())
        total, count = total + tokens * _plain_loss(backbone, batches[i]), count + tokens
    logs = model.evaluate(batches, verbose=0, return_dict=True)
    assert logs["token_loss"] == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize("remat", [False, True, "products"])
def test_gradients_equal_torch(folder: Path, backbone: Backbone, remat: bool | str) -> None:
    import torch
    import transformers

    reference = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    x, y, weights = batch = Batches(pack(_examples(), 32, join=False), 9)[0]
    logits = reference(
        torch.tensor(x["token_ids"]), attention_mask=torch.tensor((x["positions"] >= 0).astype(int))
    ).logits
    expected = torch.nn.functional.cross_entropy(
        logits.transpose(1, 2), torch.tensor(y).long(), ignore_index=-1
    )
    expected.backward()
    model = LossModel(backbone, 13, remat)
    loss, gradients = _gradients(model, batch)
    assert float(loss) == pytest.approx(expected.item(), rel=1e-5)
    named = dict(reference.named_parameters())
    assert len(named) == len(gradients)
    for variable, gradient in zip(model.trainable_variables, gradients, strict=True):
        theirs = named[_torch_name(variable.path)].grad.numpy()
        theirs = theirs.T if variable.path.endswith("kernel") else theirs
        np.testing.assert_allclose(gradient, theirs, atol=1e-4, err_msg=variable.path)


def _torch_name(path: str) -> str:
    for pattern, name in TORCH_NAMES.items():
        path = re.sub(pattern, name, path)
    return f"model.{path}.weight"


TORCH_NAMES = {
    r"/(kernel|scale|embeddings)$": "",
    "token_embedding": "embed_tokens",
    r"decoder_(\d+)/": r"layers.\1.",
    "attention_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "final_norm": "norm",
    r"attention/(\w)\w+": r"self_attn.\1_proj",
    r"mlp/(\w+)": r"mlp.\1_proj",
}


def test_packed_examples_do_not_see_each_other(backbone: Backbone) -> None:
    """Change one example of a row: the losses of the others stay as they were, to the last bit."""
    examples = _examples(6)
    rows = pack(examples, 128)
    assert len(rows) == 1
    model = LossModel(backbone)
    token_losses = _token_losses(model)
    losses = token_losses(rows)
    alone = token_losses(pack(examples, 128, join=False))
    changed_ids = np.where(rows.segment_ids == 2, (rows.token_ids + 1) % 128, rows.token_ids)
    changed = Rows(changed_ids, rows.positions, rows.segment_ids, rows.labels)
    moved = token_losses(changed) != losses
    learnt = rows.labels >= 0
    assert moved[learnt & (rows.segment_ids == 2)].all()
    assert not moved[rows.segment_ids != 2].any()
    # And each is what it is in a row of its own.
    np.testing.assert_allclose(np.sort(losses[losses > 0]), np.sort(alone[alone > 0]), rtol=1e-4)


def _token_losses(model: LossModel) -> Callable[[Rows], np.ndarray]:
    from functional_llm.training.cross_entropy import cross_entropy

    program = jax.jit(lambda x, y, w: cross_entropy(model.head, model(x), y, w, 64, False)[1])
    return lambda rows: np.asarray(program(*Batches(rows, len(rows))[0]))


def test_no_array_holds_all_logits(backbone: Backbone) -> None:
    batch = Batches(pack(_examples(40), 64), 8)[0]
    tokens, vocabulary = batch[1].size, backbone.vocabulary_size
    assert _largest(LossModel(backbone, 10_000), batch) >= tokens * vocabulary  # the test sees them
    assert _largest(LossModel(backbone, 16), batch) < tokens * vocabulary


def _largest(model: LossModel, batch: Any) -> int:
    """Returns the size of the largest array with a vocabulary's axis, forward and backward."""
    program = jax.make_jaxpr(jax.value_and_grad(_loss_function(model, batch)))(
        [v.value for v in model.trainable_variables]
    )
    return max(
        int(np.prod(shape)) for shape in _shapes(program.jaxpr) if 128 in shape and len(shape) > 1
    )


def _shapes(jaxpr: Any) -> Any:
    for equation in jaxpr.eqns:
        yield from (v.aval.shape for v in equation.outvars if hasattr(v.aval, "shape"))
        for inner in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from _shapes(inner)


MEASURE_REMAT = """
import sys
from pathlib import Path
import jax
from functional_llm.presets.backbone import Backbone
from test_training_loss import Batches, LossModel, _examples, _loss_function, pack
backbone = Backbone.from_preset(Path(sys.argv[1]))
batch = Batches(pack(_examples(99), 128), 4)[0]
for remat in ("layer", "products", "nothing"):
    model = LossModel(backbone, 64, remat)
    program = jax.jit(jax.grad(_loss_function(model, batch)))
    compiled = program.lower([v.value for v in model.trainable_variables]).compile()
    print(compiled.memory_analysis().temp_size_in_bytes)
"""


def test_rematerialising_takes_less_memory(tmp_path: Path, repository: Path) -> None:
    save_reference({**CONFIGS[FAMILY], "num_hidden_layers": 6}, tmp_path)
    # XLA reads the flag when it starts.
    paths = os.pathsep.join([str(repository), str(repository / "tests")])
    environment = {**os.environ, "PYTHONPATH": paths, "XLA_FLAGS": REMAT_XLA_FLAG}
    command = [sys.executable, "-c", MEASURE_REMAT, str(tmp_path)]
    output = subprocess.run(
        command, check=True, capture_output=True, text=True, env=environment
    ).stdout
    layer, products, nothing = map(int, output.split())
    assert layer < 0.5 * nothing
    assert layer < 0.8 * products < 0.8 * 0.6 * nothing


@pytest.mark.parametrize("remat", [False, True])
def test_dropout_goes_on_inside_layers_and_head(backbone: Backbone, remat: bool) -> None:
    def drop(layer: Any, path: str, *args: Any, **kwargs: Any) -> Any:
        return keras.layers.Dropout(0.5, seed=1)(layer(*args, **kwargs))

    dropped = rewire(backbone, call=drop, where=["decoder_*/attention/output", "final_norm"])
    head = keras.layers.Dropout(0.5, seed=2)
    outputs = dropped.output
    logits = keras.Model(outputs["hidden"], outputs["logits"])(head(outputs["hidden"]))
    dropped = Backbone(dropped.input, {**outputs, "logits": logits}, config=backbone.config)
    model = LossModel(dropped, 16, remat)
    model.compile(keras.optimizers.SGD(0.0))
    batches = Batches(pack(_examples(), 32), 3)
    states = [np.asarray(v) for v in model.non_trainable_variables]
    assert len(states) == 4
    losses = [model.train_on_batch(*batches[0])[0] for _ in range(3)]
    assert len({float(x) for x in losses}) == 3  # each step drops others
    for before, after in zip(states, model.non_trainable_variables, strict=True):
        assert (before != np.asarray(after)).any()
    logs = model.evaluate(batches, verbose=0, return_dict=True)
    assert logs == model.evaluate(batches, verbose=0, return_dict=True)


def test_only_what_is_trainable_trains(backbone: Backbone) -> None:
    frozen = rewire(backbone, freeze=True)
    for name in ("attention_norm", "mlp_norm"):
        assert frozen.get_layer("decoder_1").get_layer(name).trainable
    frozen._frozen = {  # the norms of one layer train
        key: v for key, v in frozen._frozen.items() if "decoder_1/mlp_norm" not in v.path
    }
    model = LossModel(frozen)
    model.compile("sgd")
    for name in ("trainable_variables", "trainable_weights"):  # in the order that optimizers keep
        ours, theirs = ([id(v) for v in getattr(x, name)] for x in (model, frozen))
        assert ours == theirs
    assert len(model.variables) == 1 + len(model.non_trainable_variables)
    before = {v.path: np.asarray(v) for v in model.variables}
    model.fit(Batches(pack(_examples(), 32), 2), verbose=0, shuffle=False)
    moved = [v.path for v in model.variables if (before[v.path] != np.asarray(v)).any()]
    assert moved == ["decoder_1/mlp_norm/scale"]
    assert len(backbone.trainable_variables) > 10


def test_a_backbone_trains_without_this_module(backbone: Backbone) -> None:
    batches = Batches(pack(_examples(), 32), 3)
    loss = keras.losses.SparseCategoricalCrossentropy(
        from_logits=True, reduction="mean_with_sample_weight"
    )
    expected = _plain_loss(backbone, batches[0])
    backbone.compile(keras.optimizers.Adam(1e-2), loss)
    x, y, weights = batches[0]
    history = backbone.fit(x, y, sample_weight=weights, epochs=5, verbose=0).history["loss"]
    assert history[0] == pytest.approx(expected, rel=1e-4)
    assert history[-1] < 0.7 * history[0]


def _uneven_batch(backbone: Backbone) -> Any:
    """Four rows of which one has most of the labels, two have few, and one has none."""
    rng = np.random.default_rng(3)
    token_ids = rng.integers(0, backbone.vocabulary_size, (4, 24)).astype("int32")
    labels = rng.integers(0, backbone.vocabulary_size, (4, 24)).astype("int32")
    for row, count in enumerate((20, 2, 0, 3)):
        labels[row, count:] = -100  # what Transformers leaves out
    weights = rng.uniform(0.2, 2.0, labels.shape).astype("float32")
    return token_ids, labels, weights


def _torch_loss(folder: Path, batch: Any) -> float:
    import torch
    import transformers

    token_ids, labels, weights = (torch.tensor(x) for x in batch)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        logits = model(token_ids.long()).logits
    losses = torch.nn.functional.cross_entropy(
        logits.transpose(1, 2), labels.long(), reduction="none"
    )
    weights = weights * (labels >= 0)
    return float((losses * weights).sum() / weights.sum())


@pytest.mark.parametrize("clip", [None, 0.05])
def test_a_step_over_batches_is_that_of_one_batch_of_their_rows(
    folder: Path, clip: float | None
) -> None:
    """Whatever their label counts: loss as torch gives it for all rows, gradient, momentum."""
    results = []
    for accumulate in (None, 2, 4):
        backbone = Backbone.from_preset(folder)
        batch = _uneven_batch(backbone)
        optimizer = keras.optimizers.SGD(
            0.1, momentum=0.9, global_clipnorm=clip, gradient_accumulation_steps=accumulate
        )
        backbone.compile(optimizer)
        x, y, weights = batch
        history = backbone.fit(
            x, y, sample_weight=weights, batch_size=4 // (accumulate or 1), epochs=2,
            shuffle=False, verbose=0,
        ).history  # fmt: skip
        assert list(history) == ["loss"]
        results.append((history["loss"], [np.asarray(v) for v in backbone.trainable_variables]))
    assert results[0][0][0] == pytest.approx(_torch_loss(folder, batch), rel=1e-5)
    for losses, values in results[1:]:
        np.testing.assert_allclose(losses, results[0][0], rtol=1e-5)
        for value, expected in zip(values, results[0][1], strict=True):
            np.testing.assert_allclose(value, expected, atol=4e-6)


def test_a_batch_that_overflows_counts_for_nothing(folder: Path) -> None:
    rng = np.random.default_rng(0)
    rows = rng.integers(0, 128, (3, 2, 12)).astype("int32")
    weights = np.ones((2, 12), "float32")
    weights[0, 4:] = 0

    def trained(batches: list[int]) -> list[np.ndarray]:
        model = LossModel(Backbone.from_preset(folder))
        inner = keras.optimizers.SGD(0.1, gradient_accumulation_steps=2)
        optimizer = keras.optimizers.LossScaleOptimizer(inner, initial_scale=2.0**10)
        model.compile(optimizer, auto_scale_loss=False)
        for number in batches:
            bad = np.where(weights > 0, np.inf, 0).astype("float32")
            model.train_on_batch(rows[number], sample_weight=bad if number == 2 else weights)
        assert float(optimizer.dynamic_scale) == 2.0**10 / 2 ** batches.count(2)
        return [np.array(v) for v in model.trainable_variables]

    expected = trained([0, 1, 1, 0])
    for batches in ([2, 0, 1, 1, 0], [0, 2, 1, 1, 0], [0, 1, 2, 2, 1, 0]):
        for received, value in zip(trained(batches), expected, strict=True):
            np.testing.assert_allclose(received, value, atol=1e-6)


def test_compile_without_a_loss_trains_a_language_model(folder: Path) -> None:
    backbone = Backbone.from_preset(folder)
    x, y, weights = batch = _uneven_batch(backbone)
    expected = _torch_loss(folder, batch)
    backbone.compile("adamw")
    assert backbone.evaluate(x, y, sample_weight=weights, verbose=0) == pytest.approx(expected)
    reference = LossModel(Backbone.from_preset(folder), 32)
    reference.compile("adamw")
    ours = [backbone.train_on_batch(x, y, weights) for _ in range(3)]
    theirs = [reference.train_on_batch(x, y, weights)[0] for _ in range(3)]
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)
    assert ours[-1] < ours[0]
    logits = backbone.predict(x, verbose=0)  # the model's outputs are still its logits
    np.testing.assert_allclose(logits, backbone(x), atol=1e-5)


def test_the_default_loss_never_holds_all_logits(backbone: Backbone) -> None:
    backbone.compile("sgd", chunk_size=16)
    backbone.optimizer.build(backbone.trainable_variables)
    x, y, weights = Batches(pack(_examples(40), 64), 8)[0]
    variables = (
        backbone.trainable_variables,
        backbone.non_trainable_variables,
        backbone.optimizer.variables,
        backbone.metrics_variables,
    )
    state = tuple([v.value for v in group] for group in variables)
    program = jax.make_jaxpr(backbone.train_step)(state, (x, y, weights))
    sizes = [int(np.prod(s)) for s in _shapes(program.jaxpr) if 128 in s and len(s) > 1]
    assert sizes and max(sizes) < y.size * backbone.vocabulary_size


def test_without_labels_each_token_predicts_the_next_of_its_example(backbone: Backbone) -> None:
    rows = pack([Example(x.token_ids, np.arange(len(x.token_ids)) > 0) for x in _examples()], 32)
    x, y, _ = Batches(rows, len(rows))[0]
    backbone.compile("sgd")
    # The last token of an example is only a label, and so it is no input here.
    last = np.pad(x["segment_ids"][:, 1:] != x["segment_ids"][:, :-1], ((0, 0), (0, 1)))
    last[:, -1] = True
    expected = backbone.evaluate(x, np.where(last, -1, y), verbose=0)
    assert backbone.evaluate(x, verbose=0) == pytest.approx(expected, rel=1e-6)


def test_callbacks_see_the_backbone(backbone: Backbone, tmp_path: Path) -> None:
    x, y, weights = _uneven_batch(backbone)
    seen = []

    class Look(keras.callbacks.Callback):
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            seen.append((self.model, np.asarray(self.model.trainable_variables[0])))

    backbone.compile("adamw")
    backbone.fit(x, y, batch_size=2, verbose=0, callbacks=[Look()])
    assert [model is backbone for model, _ in seen] == [True, True]
    assert (seen[0][1] != seen[1][1]).any()


def test_a_rewired_model_is_compiled_anew(backbone: Backbone) -> None:
    x, y, weights = _uneven_batch(backbone)
    backbone.compile("sgd")
    first = backbone.evaluate(x, y, sample_weight=weights, verbose=0)
    with_less = rewire(backbone, lambda layer, path: keras.layers.Identity(), where="final_norm")
    assert len(with_less.layers) == len(backbone.layers)
    with_less.compile("sgd")
    assert with_less.evaluate(x, y, sample_weight=weights, verbose=0) != pytest.approx(first)
    assert backbone.evaluate(x, y, sample_weight=weights, verbose=0) == pytest.approx(first)


@pytest.mark.parametrize(
    "loss",
    [
        "sparse_categorical_crossentropy",
        "SparseCategoricalCrossentropy",
        keras.losses.CategoricalCrossentropy(),
        keras.losses.sparse_categorical_crossentropy,
        {"class_name": "BinaryCrossentropy", "config": {}},
    ],
)
def test_a_loss_of_probabilities_is_refused(backbone: Backbone, loss: Any) -> None:
    with pytest.raises(ValueError, match="takes logits"):
        backbone.compile("adamw", loss)


class Generated(keras.utils.PyDataset):
    """Batches of which the second is another."""

    def __init__(self, first: Any, second: Any) -> None:
        super().__init__()
        self.batches = [first, second]

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> Any:
        return self.batches[index]


@pytest.mark.parametrize("what", ["fit", "evaluate", "train_on_batch", "test_on_batch"])
def test_ids_beyond_the_vocabulary_are_refused_and_weights_stay(
    backbone: Backbone, what: str
) -> None:
    ids = np.arange(16, dtype="int32").reshape(2, 8)
    wrong, no_labels = np.where(ids == 5, 128, ids), np.full_like(ids, -100)
    backbone.compile("adamw")
    kwargs: Any = {} if "batch" in what else {"verbose": 0}
    run = getattr(backbone, what)
    run(ids, np.where(ids < 9, ids, no_labels), **kwargs)
    before = [np.array(v) for v in backbone.variables]
    with pytest.raises(ValueError, match=r"labels from 0 to 127, or negative .* from 0 to 128"):
        run(ids, wrong, **kwargs)
    with pytest.raises(ValueError, match="token ids from 0 to 127, received token ids from 0 to"):
        run({"token_ids": wrong}, **kwargs)
    if "batch" not in what:
        with pytest.raises(ValueError, match="received labels from 0 to 128"):
            run(Generated((ids, ids), (ids, wrong)), **kwargs)
    else:
        for old, variable in zip(before, backbone.variables, strict=True):
            np.testing.assert_array_equal(variable, old)
    assert all(np.isfinite(v).all() for v in backbone.variables)
    run(ids, **kwargs)


def test_other_losses_and_predict_check_token_ids(backbone: Backbone) -> None:
    ids = np.arange(8, dtype="int32").reshape(1, 8)
    backbone.compile("sgd", "mse")
    backbone.train_on_batch(ids, np.full((1, 8, 128), 300))  # labels of another kind
    for run in (backbone.predict, backbone.predict_on_batch):
        with pytest.raises(ValueError, match="received token ids from 0 to 500"):
            run(np.where(ids == 7, 500, 0))


def test_bad_arguments_of_training(backbone: Backbone) -> None:
    x, y, _ = _uneven_batch(backbone)
    with pytest.raises(ValueError, match="no metrics beside the default loss"):
        backbone.compile("adamw", metrics=["accuracy"])
    backbone.compile("adamw")
    for labels in (y[:, :-1], y.astype("float32")):
        with pytest.raises(ValueError, match=r"labels of the shape of token_ids"):
            backbone.evaluate(x, labels, verbose=0)
    with pytest.raises(ValueError, match=r"sample weights of the shape"):
        backbone.evaluate(x, y, sample_weight=np.ones((4, 7)), verbose=0)


def test_a_model_in_which_nothing_trains_is_refused(backbone: Backbone) -> None:
    """As Keras has it, a layer that trains does not in a model whose own `trainable` is False."""
    x, y, _ = _uneven_batch(backbone)
    backbone.trainable = False
    backbone.get_layer("decoder_1").trainable = True
    backbone.compile("sgd")
    with pytest.raises(ValueError, match="Expected trainable weights.*set that of its layers"):
        backbone.fit(x, y, verbose=0)
    backbone.evaluate(x, y, verbose=0)


def test_bfloat16_trains(folder: Path) -> None:
    backbone = Backbone.from_preset(folder, dtype="mixed_bfloat16")
    model = LossModel(backbone, 32)
    model.compile(keras.optimizers.Adam(1e-2))
    batches = Batches(pack(_examples(), 32), 3)
    assert all(v.dtype == "float32" for v in model.trainable_variables)
    losses = [float(model.train_on_batch(*batches[0])[0]) for _ in range(4)]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("cosine", [0.1, 0.2, 0.3, 0.15 * (1 + np.cos(np.pi / 4)), 0.15, 0.0]),
        ("linear", [0.1, 0.2, 0.3, 0.225, 0.15, 0.0]),
        ("constant", [0.1, 0.2, 0.3, 0.3, 0.3, 0.3]),
    ],
)
def test_schedules(kind: str, expected: list[float]) -> None:
    schedule = make_schedule(kind, 0.3, steps=6, warmup_steps=2)
    rates = [float(schedule(step)) for step in (0, 1, 2, 3, 4, 6)]
    np.testing.assert_allclose(rates, expected, rtol=1e-5, atol=1e-8)
    copy = type(schedule).from_config(schedule.get_config())
    assert float(copy(3)) == pytest.approx(expected[3])
    in_batches = make_schedule(kind, 0.3, 6, 2, accumulate=4)
    assert [float(in_batches(step)) for step in (12, 15)] == [pytest.approx(expected[3])] * 2


def test_bad_schedules() -> None:
    with pytest.raises(ValueError, match="cosine, linear, constant, received 'cosin'"):
        make_schedule("cosin", 1.0, 10)
    with pytest.raises(ValueError, match="fewer steps of warm-up than steps, received 10 and 10"):
        make_schedule("cosine", 1.0, 10, 10)
