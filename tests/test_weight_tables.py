"""The engine of weight tables by itself: many tensors in one variable, as checkpoints have them.

The checkpoints of experts are those that Transformers writes of tiny random models, and what
expert computes what is as its modules say. Other layouts are made by hand.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import keras
import numpy as np
import pytest
import torch
import transformers

from functional_llm.backbones.transforms import TRANSFORMS, Row, Transform, fused
from functional_llm.formats.safetensors_reader import open_safetensors
from functional_llm.formats.safetensors_writer import write_safetensors
from functional_llm.formats.table_checks import check_source
from functional_llm.formats.tensor_source import TensorSource
from functional_llm.formats.weight_table import (
    expand_table,
    export_weights,
    in_one_tensor,
    load_weights,
    module_names,
    shapes_of,
)
from functional_llm.graph.placing import assign

E, D, F, LAYERS = 3, 8, 12, 2


class Experts(keras.layers.Layer):
    """What a layer of experts holds: a matrix for each, with or without biases."""

    def __init__(self, name: str, biases: bool = False, dtype: str = "float32") -> None:
        super().__init__(name=name, dtype=dtype)
        for part, sizes in {"gate": (D, F), "up": (D, F), "down": (F, D)}.items():
            self.add_weight((E, *sizes), name=part)
            if biases:
                self.add_weight((E, sizes[1]), name=f"{part}_bias")


def model(biases: bool = False, dtype: str = "float32") -> list[keras.Variable]:
    layers = [Experts(f"decoder_{i}", biases, dtype) for i in range(LAYERS)]
    return [variable for layer in layers for variable in layer.variables]


@dataclass
class Memory:
    """A checkpoint in memory that notes what is read."""

    arrays: Mapping[str, np.ndarray]
    reads: list[tuple[str, str]] = field(default_factory=list)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: array.shape for name, array in self.arrays.items()}

    def read(self, name: str, dtype: str) -> np.ndarray:
        self.reads.append((name, dtype))
        return self.arrays[name].astype(dtype)


def load(
    rows: Sequence[Row], source: TensorSource, ignored: Sequence[str] = (), **options: Any
) -> list[keras.Variable]:
    variables = model(**options)
    tensors = expand_table(rows, shapes_of(variables), LAYERS)
    check_source(tensors, shapes_of(variables), source, ignored)
    load_weights(variables, tensors, source)
    return variables


def export(rows: Sequence[Row], variables: list[keras.Variable]) -> dict[str, np.ndarray]:
    return dict(export_weights(variables, expand_table(rows, shapes_of(variables), LAYERS)))


def one_by_one(prefix: str, gate: str, up: str, down: str) -> list[Row]:
    """Rows of a Linear for each part of each expert."""
    parts = {"gate": gate, "up": up, "down": down}
    return [
        (f"model.layers.{{}}.{prefix}[.{{expert}}].{name}.weight", f"decoder_{{}}/{part}", x)
        for (part, name), x in zip(parts.items(), ["transpose"] * 3, strict=True)
    ]


def stacked(gate_up: str, down: str, change: str | Transform, way_down: str) -> list[Row]:
    """Rows of tensors that hold all experts, gate and up in one."""
    gate_up, down = f"model.layers.{{}}.{gate_up}", f"model.layers.{{}}.{down}"
    parts = [(gate_up, f"decoder_{{}}/{part}", change) for part in ("gate", "up")]
    return [*parts, (down, "decoder_{}/down", way_down)]


_TURNED = Transform(lambda x: x, lambda x: x, axis=-1, groups=F)  # gate and up in turn
QWEN3 = one_by_one("mlp.experts", "gate_proj", "up_proj", "down_proj")
GPT_OSS = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"
LAYOUTS: dict[str, list[Row]] = {
    "mixtral": one_by_one("block_sparse_moe.experts", "w1", "w3", "w2"),
    "qwen3_moe": QWEN3,
    "granitemoe": stacked(
        "block_sparse_moe.input_linear.weight",
        "block_sparse_moe.output_linear.weight",
        fused()[0],
        "transpose",
    ),
    "llama4_text": stacked(
        "feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj", "last_axis", "same"
    ),
    "gemma4_text": stacked("experts.gate_up_proj", "experts.down_proj", fused()[0], "transpose"),
    "gpt_oss": [
        *stacked(*GPT_OSS, _TURNED, "same"),
        *((x + "_bias", y + "_bias", fused(F)[1]) for x, y, _ in stacked(*GPT_OSS, "", "")[:2]),
        (f"model.layers.{{}}.{GPT_OSS[1]}_bias", "decoder_{}/down_bias", "same"),
    ],
}


def reference(name: str) -> Any:
    """Returns Transformers' tiny random model."""
    numbers: dict[str, Any] = {
        "vocab_size": 32,
        "hidden_size": D,
        "intermediate_size": F,
        "moe_intermediate_size": F,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 4,
        "num_experts": E,
        "num_local_experts": E,
        "num_experts_per_tok": 1,
        "pad_token_id": None,
        "interleave_moe_layer_step": 1,
        "enable_moe_block": True,
        "top_k_experts": 1,
        "hidden_size_per_layer_input": 0,
        "num_kv_shared_layers": 0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    }
    if name == "gemma4_text":
        del numbers["rope_parameters"]
    config = transformers.AutoConfig.for_model(name, **numbers)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def experts_of(model: Any, layer: int) -> Any:
    modules = dict(model.named_modules())
    return next(
        x for name, x in modules.items() if f".{layer}." in name and name.endswith(".experts")
    )


def compute(experts: Any, x: np.ndarray) -> np.ndarray:
    """Returns what each expert of Transformers makes of the same vectors, (E, T, D)."""
    rows = torch.tensor(x)
    with torch.inference_mode():
        if type(experts).__name__ == "Llama4TextExperts":
            return experts(rows.repeat(E, 1)).reshape(E, *x.shape).numpy()
        chosen = [torch.full((len(x), 1), e) for e in range(E)]
        return np.stack([experts(rows, e, torch.ones(len(x), 1)).numpy() for e in chosen])


def ours(name: str, weights: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    gate, up = (
        x @ weights[part] + weights.get(f"{part}_bias", np.zeros((E, F)))[:, None]
        for part in ("gate", "up")
    )
    if name == "gpt_oss":
        hidden = gate / (1 + np.exp(-1.702 * gate)) * (up + 1)
    elif name == "gemma4_text":
        hidden = torch.nn.functional.gelu(torch.tensor(gate), approximate="tanh").numpy() * up
    else:
        hidden = gate / (1 + np.exp(-gate)) * up
    return hidden @ weights["down"] + weights.get("down_bias", np.zeros((E, D)))[:, None]


@pytest.mark.parametrize("name", LAYOUTS)
def test_experts_lie_as_transformers_writes_them(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs, rows = reference(name), LAYOUTS[name]
    theirs.save_pretrained(tmp_path, max_shard_size=3000)  # many files, in any order
    source = open_safetensors(tmp_path)
    heads = {row[0].partition("{}")[2].partition("[")[0] for row in rows}
    others = [x for x in source.shapes if not any(head in x for head in heads)]
    variables = load(rows, source, others, biases=name == "gpt_oss")
    x = np.random.default_rng(0).normal(size=(5, D)).astype("float32")
    for layer in range(LAYERS):
        prefix = f"decoder_{layer}/"
        weights = {
            v.path.removeprefix(prefix): np.asarray(v.value)
            for v in variables
            if v.path.startswith(prefix)
        }
        expected = compute(experts_of(theirs, layer), x)
        np.testing.assert_allclose(ours(name, weights, x), expected, atol=1e-5, rtol=0)
    exported = export(rows, variables)
    assert exported.keys() == set(source.shapes) - set(others)
    for tensor, array in exported.items():
        np.testing.assert_array_equal(array, source.read(tensor, "float32"))


def test_one_table_reads_experts_apart_and_in_one() -> None:
    random = np.random.default_rng(1)
    variables = model()
    for variable in variables:
        variable.assign(random.normal(size=variable.shape))
    apart = export(QWEN3, variables)
    assert len(apart) == LAYERS * E * 3
    whole = [(in_one_tensor(name), path, change) for name, path, change in QWEN3]
    in_one = export(whole, variables)
    assert in_one["model.layers.1.mlp.experts.down_proj.weight"].shape == (E, D, F)
    for rows, arrays in ((QWEN3, apart), (whole, in_one)):
        for variable, expected in zip(load(rows, Memory(arrays)), variables, strict=True):
            np.testing.assert_array_equal(variable.value, expected.value)


def test_gate_and_up_of_each_expert_in_one_tensor() -> None:
    """In turn, row by row, besides."""
    name = "layers.{}.experts[{expert}].gate_up.weight"
    rows: list[Row] = [
        (name, "decoder_{}/gate", fused(F)[0]),
        (name, "decoder_{}/up", fused(F)[0]),
        ("layers.{}.experts.down[_{expert}]", "decoder_{}/down", "same"),
    ]
    random = np.random.default_rng(2)
    arrays = {
        f"layers.{i}.experts{e}.gate_up.weight": random.normal(size=(2 * F, D)).astype("float32")
        for i in range(LAYERS)
        for e in range(E)
    }
    arrays |= {
        f"layers.{i}.experts.down_{e}": random.normal(size=(F, D)).astype("float32")
        for i in range(LAYERS)
        for e in range(E)
    }
    variables = load(rows, Memory(arrays))
    values = {v.path: np.asarray(v.value) for v in variables}
    fused_one = arrays["layers.1.experts2.gate_up.weight"]
    np.testing.assert_array_equal(values["decoder_1/gate"][2], fused_one[::2].T)
    np.testing.assert_array_equal(values["decoder_1/up"][2], fused_one[1::2].T)
    np.testing.assert_array_equal(values["decoder_0/down"][1], arrays["layers.0.experts.down_1"])
    exported = export(rows, variables)
    assert exported.keys() == arrays.keys()
    for tensor, array in exported.items():
        np.testing.assert_array_equal(array, arrays[tensor])


def _arrays() -> dict[str, np.ndarray]:
    shapes = {"gate_proj": (F, D), "up_proj": (F, D), "down_proj": (D, F)}
    return {
        f"model.layers.{i}.mlp.experts.{e}.{part}.weight": np.zeros(shape, "float32")
        for i in range(LAYERS)
        for e in range(E)
        for part, shape in shapes.items()
    }


def _without(*parts: str) -> dict[str, np.ndarray]:
    return {x: t for x, t in _arrays().items() if not any(part in x for part in parts)}


_GATE = "model.layers.{}.mlp.experts.{}.gate_proj.weight"


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        (
            _without("1.mlp.experts.2.gate_proj", "0.mlp.experts.0.down"),
            ["2 differences", _GATE.format(1, 2), "expert 2 of layer 1", "expert 0 of layer 0"],
        ),
        (
            _arrays() | {_GATE.format(1, 3): np.zeros((F, D))},
            ["unknown", _GATE.format(1, 3), "expert 3 of layer 1"],
        ),
        (
            _arrays() | {_GATE.format(0, 1): np.zeros((F + 1, D))},
            [_GATE.format(0, 1), str((F, D)), str((F + 1, D))],
        ),
        (_without(".2."), ["6 differences", "expert 2 of layer 0", "expert 2 of layer 1"]),
        (
            _arrays() | {"model.layers.1.mlp.experts.gate_proj.weight": np.zeros((E, F, D))},
            ["unknown tensor 'model.layers.1.mlp.experts.gate_proj.weight'"],
        ),
    ],
)
def test_what_does_not_fit_is_named(arrays: dict[str, np.ndarray], words: list[str]) -> None:
    with pytest.raises(ValueError, match="does not fit") as error:
        load(QWEN3, Memory(arrays))
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize("name", ["granitemoe", "llama4_text", "gpt_oss"])
def test_a_fused_tensor_of_another_size_is_named(name: str) -> None:
    options: dict[str, Any] = {"biases": name == "gpt_oss"}
    arrays = export(LAYOUTS[name], model(**options))
    for tensor, array in arrays.items():
        for axis in range(array.ndim):
            changed = np.concatenate([array, array.take([0], axis)], axis)
            with pytest.raises(ValueError, match=rf"{tensor}.*expected shape"):
                load(LAYOUTS[name], Memory({**arrays, tensor: changed}), **options)


def test_one_variable_at_a_time_is_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Entries are put together in one buffer, and handed over with the last."""
    source = Memory(_arrays())
    assigned: list[int] = []
    assign = keras.Variable.assign

    def count(variable: keras.Variable, value: Any) -> Any:
        assigned.append(len(source.reads))
        return assign(variable, value)

    variables = model()
    tensors = expand_table(QWEN3, shapes_of(variables), LAYERS)
    monkeypatch.setattr(keras.Variable, "assign", count)
    load_weights(variables, tensors, source)
    # One tensor is read ahead.
    expected = [min(E * (i + 1) + 1, len(tensors)) for i in range(len(variables))]
    assert len(assigned) == len(variables)
    assert all(x <= y for x, y in zip(assigned, expected, strict=True))


def test_shards_are_written_of_entries(tmp_path: Path) -> None:
    variables = model()
    tensors = export_weights(variables, expand_table(QWEN3, shapes_of(variables), LAYERS))
    write_safetensors(tmp_path, tensors, max_shard_bytes=900)
    assert len(list(tmp_path.glob("*.safetensors"))) == 9  # two tensors in each
    again = load(QWEN3, open_safetensors(tmp_path))
    for variable, expected in zip(again, variables, strict=True):
        np.testing.assert_array_equal(variable.value, expected.value)


def test_experts_are_no_module() -> None:
    rows: list[Row] = [
        ("layers.{}.experts[.{expert}].up_proj.weight", "decoder_{}/up/kernel", "transpose"),
        ("layers.{}.router.weight", "decoder_{}/router/kernel", "transpose"),
    ]
    assert module_names(rows, 1) == {"decoder_0/router": "layers.0.router"}


def test_entries_are_read_in_the_dtype_of_the_variable() -> None:
    source = Memory(_arrays())
    variables = load(QWEN3, source, dtype="bfloat16")
    assert {dtype for _, dtype in source.reads} == {"bfloat16"}
    assert {str(v.dtype) for v in variables} == {"bfloat16"}


def test_numbers_that_are_computed_are_read_in_float32() -> None:
    """A logarithm of a rounded number has fewer digits than a rounded logarithm."""
    random = np.random.default_rng(3)
    variables = [keras.Variable(np.zeros((D, F), "float32"), name="a_log", dtype="bfloat16")]
    logs = random.normal(size=(D, F)).astype("float32")
    source = Memory({"blk.0.ssm_a": -np.exp(logs)})
    tensors = expand_table([("blk.0.ssm_a", "a_log", "log_of_negative")], shapes_of(variables), 1)
    load_weights(variables, tensors, source)
    assert source.reads == [("blk.0.ssm_a", "float32")]
    np.testing.assert_allclose(
        np.asarray(variables[0].value, "float32"), logs, rtol=2**-8, atol=1e-6
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(300, 257), (2, 130, 300), (3, 5), (1, 400)])
def test_matrices_larger_than_a_tile_are_transposed(shape: tuple[int, ...], dtype: str) -> None:
    """From file to variable, and back."""
    array = np.random.default_rng(0).normal(size=shape).astype(jnp.dtype(dtype))
    expected = array.tobytes(), jnp.asarray(array).swapaxes(-1, -2)
    transpose = TRANSFORMS["transpose"]
    (split,) = transpose.split(array, [0])
    assert split.flags.c_contiguous
    np.testing.assert_array_equal(split, expected[1], strict=True)
    assert transpose.join([split]).tobytes() == expected[0]
    (view,) = transpose.views(array, [0])
    variable = keras.Variable(jnp.zeros(view.shape), dtype=dtype)
    assign(variable, view)
    np.testing.assert_array_equal(np.asarray(variable.value), split, strict=True)
