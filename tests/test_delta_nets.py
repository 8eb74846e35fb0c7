"""The delta rule by its definition, in chunks and step by step; models that have it."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import functional_llm as flm
from configs import CONFIGS
from functional_llm.backbones.families import FAMILIES
from functional_llm.formats.hf_config import read_config
from functional_llm.kernels.delta_rule import DeltaInputs, delta_rule, delta_rule_in_chunks
from functional_llm.layers.delta_rule import DeltaRule
from reference import save_reference

B, K, G, T, H, V = 2, 2, 3, 75, 8, 12  # three chunks, the last of which is not full
ENDS = (0, 5, 6, 36, 71, T)  # of texts: one within a chunk, one over the end of one


def _inputs(kind: str, channels: int = 1) -> tuple[list[np.ndarray], np.ndarray]:
    """Returns queries, keys, values, decays of all channels or of each, rates; and a state."""
    random = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return random.normal(size=shape).astype("float32")

    def unit(x: np.ndarray) -> np.ndarray:
        return x / np.linalg.norm(x, axis=-1, keepdims=True)

    query, key = unit(normal(B, K, 1, T, H)) * H**-0.5, unit(normal(B, K, 1, T, H))
    decay = -np.exp(normal(B, K, G, T, channels))
    rate = 1 / (1 + np.exp(-normal(B, K, G, T)))
    if kind == "one key":  # of which a triangular system by powers makes numbers of 1e25
        key[:] = key[..., :1, :]
        decay, rate = decay * 1e-4, np.full_like(rate, 0.999)
    if kind == "much, then little":  # differences of sums over all tokens would have no digits
        often = random.uniform(size=decay.shape) < 0.1
        decay = np.where(often, -3000, -0.01).astype("float32")
    return [query, key, normal(B, K, G, T, V), decay, rate], normal(B, K, G, H, V)


def _by_tokens(
    inputs: list[np.ndarray], state: np.ndarray, text: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The recurrence as the paper has it, in float64."""
    query, key, value, decay, rate = (x.astype("float64") for x in inputs)
    state, outputs = state.astype("float64"), []
    for t in range(value.shape[-2]):
        goes_on = t == 0 or text[t] == text[t - 1]
        state = state * np.exp(decay[..., t, :, None]) * goes_on
        known = (key[..., t, :, None] * state).sum(-2)
        correction = rate[..., t, None] * (value[..., t, :] - known)
        state = state + key[..., t, :, None] * correction[..., None, :]
        outputs.append((query[..., t, :, None] * state).sum(-2))
    return np.stack(outputs, -2), state


@pytest.mark.parametrize("channels", [1, H])
@pytest.mark.parametrize("rule", [delta_rule, delta_rule_in_chunks])
def test_the_rule_equals_the_recurrence(rule: Any, channels: int) -> None:
    first = np.zeros((1, 1, 1, 1), "int32")
    program = jax.jit(
        lambda inputs, state, text: rule(
            DeltaInputs(*[*inputs, text[None, None, None], first]), state
        )
    )
    one, several = np.zeros(T, "int32"), np.repeat(np.arange(5), np.diff(ENDS)).astype("int32")
    for kind in ("any", "one key", "much, then little"):
        inputs, state = _inputs(kind, channels)
        for text in (one, several):
            expected = _by_tokens(inputs, state, text)
            for received, own in zip(program(inputs, state, text), expected, strict=True):
                np.testing.assert_allclose(received, own, atol=1e-5, rtol=0, err_msg=kind)


@pytest.mark.parametrize("channels", [1, H])
def test_one_token_is_a_step(channels: int) -> None:
    inputs, state = _inputs("any", channels)
    inputs = [x[..., :1, :] for x in inputs[:4]] + [inputs[4][..., :1]]
    expected = _by_tokens(inputs, state, np.zeros(1))
    received = delta_rule_in_chunks(DeltaInputs(*inputs), jnp.asarray(state))
    for own, theirs in zip(received, expected, strict=True):
        np.testing.assert_allclose(own, theirs, atol=1e-5)


@pytest.mark.parametrize(("channels", "compared"), [(1, 2048), (4, 600)])
def test_gradients_are_finite_and_those_of_the_definition(channels: int, compared: int) -> None:
    """In bfloat16, of 2048 tokens, some of which are padding, decay all or have one key.

    The definition has a number for each pair of tokens and channel that decays by itself.
    """
    random, length = np.random.default_rng(1), 2048
    shapes = {"query": (1, 1, 4), "key": (1, 1, 4), "value": (1, 2, 4)}
    inputs = {
        name: jnp.asarray(random.normal(size=(1, length, *shape)) / 2, "bfloat16")
        for name, shape in shapes.items()
    }
    inputs["key"] = inputs["key"].at[:, 300:400].set(inputs["key"][:, :1])
    decay = -np.exp(random.normal(size=(1, length, 1, 2, channels)))
    decay[:, 500:520] = -1e4
    inputs["decay"] = jnp.asarray(decay, "float32")
    inputs["rate"] = jnp.asarray(random.uniform(size=(1, length, 1, 2)), "bfloat16")
    inputs["state"] = jnp.zeros((1, 1, 2, 4, 4))

    def loss(inputs: Any, in_chunks: bool) -> Any:
        layer, places = DeltaRule(), np.arange(inputs["rate"].shape[1])
        layer.in_chunks = in_chunks
        positions = np.where(places < len(places) - 48, places, -1)[None]
        result = layer.call({**inputs, "positions": positions, "segment_ids": None})
        return jnp.sum(jnp.square(result["x"])) + jnp.sum(result["state"])

    gradient = jax.jit(jax.grad(loss), static_argnums=1)

    def gradients(length: int, in_chunks: bool) -> dict[str, np.ndarray]:
        cut = {name: x if name == "state" else x[:, :length] for name, x in inputs.items()}
        return {name: np.asarray(x, "float32") for name, x in gradient(cut, in_chunks).items()}

    whole = gradients(length, in_chunks=True)
    assert all(np.isfinite(x).all() for x in whole.values())
    ours = whole if compared == length else gradients(compared, in_chunks=True)
    theirs = gradients(compared, in_chunks=False)
    for name, x in ours.items():
        np.testing.assert_allclose(x, theirs[name], atol=1e-2, rtol=1e-2, err_msg=name)


def _read(name: str, **changes: Any) -> Any:
    raw = {**CONFIGS[name], **changes}
    raw = {key: x for key, x in raw.items() if x != "absent"}
    return read_config(raw, FAMILIES[raw["model_type"]])


def test_what_a_config_leaves_out() -> None:
    config = _read("qwen3_5_grouped_values", layer_types="absent", num_hidden_layers=8)
    assert config.layer_types == (("linear_attention",) * 3 + ("full_attention",)) * 2
    absent = dict.fromkeys(("linear_num_key_heads", "head_dim", "rope_parameters"), "absent")
    config = _read("qwen3_5_grouped_values", **absent, linear_num_value_heads=16)
    assert (config.num_delta_key_heads, config.head_dim) == (16, 256)
    assert config.partial_rotary_factor == 0.25


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_types": ["linear_attention"]}, "expected layer_types of 2 words"),
        ({"layer_types": ["linear_attention", "conv"]}, "unknown ones: .*conv"),
        ({"layer_types": "absent", "full_attention_interval": 0}, "full_attention_interval of at"),
        ({"linear_num_value_heads": 3}, "linear_num_value_heads to be a multiple of"),
        ({"attn_output_gate": False}, "attn_output_gate=False"),
        ({"mlp_only_layers": [0]}, "mlp_only_layers"),
    ],
)
def test_configs_of_no_model(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _read("qwen3_5_grouped_values", **changes)


_NETS = CONFIGS["kimi_linear_nets_then_attention"]["linear_attn_config"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"linear_attn_config": {**_NETS, "kda_layers": [1, 2]}}, "each layer from 1 to 2 in one"),
        ({"linear_attn_config": {**_NETS, "full_attn_layers": [3]}}, "each layer from 1 to 2 in"),
        ({"linear_attn_config": {**_NETS, "head_dim": 0}}, "with positive integers for"),
        ({"linear_attn_config": [1]}, r"Received: \[1\]"),
        ({"linear_num_heads": 5}, "expected linear_num_heads to say what linear_attn_config"),
        ({"layer_types": ["linear_attention"] * 2}, "expected layer_types to say what linear_attn"),
        ({"mlp_layer_types": ["sparse", "dense"]}, "expected mlp_layer_types of 2 words"),
        ({"mlp_layer_types": ["sparse"] * 2}, "expected first_k_dense_replace to say what"),
        ({"mla_use_nope": False}, "mla_use_nope=False"),
        ({"tie_word_embeddings": True}, "expected tie_word_embeddings to be false"),
        ({"num_expert_group": 3}, "expected n_group that divides"),
    ],
)
def test_configs_of_no_kimi_linear(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _read("kimi_linear_nets_then_attention", **changes)


def test_a_kimi_linear_as_published_and_as_transformers_writes_it() -> None:
    published = _read("kimi_linear_nets_then_attention")
    absent = dict.fromkeys(("linear_attn_config", "first_k_dense_replace"), "absent")
    words = {"layer_types": ["linear_attention", "full_attention"]}
    sizes = {"linear_head_dim": 8, "linear_num_heads": 3, "linear_conv_kernel_dim": 4}
    words["mlp_layer_types"] = ["dense", "sparse"]
    assert _read("kimi_linear_nets_then_attention", **absent, **words, **sizes) == published
    default = _read("kimi_linear_wide_kernel_all_chosen", num_hidden_layers=9, layer_types="absent")
    assert [i for i, x in enumerate(default.layer_types) if x == "full_attention"] == [4, 8]
    assert default.first_expert_layer == 1


def test_a_published_directory_holds_more_than_the_text_model(tmp_path: Path) -> None:
    """The wrapper with images, and the layers that predict further tokens."""
    import transformers

    text = save_reference(CONFIGS["qwen3_5_grouped_values"], tmp_path / "text")
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2}
    config = transformers.Qwen3_5Config(
        text_config=text.config.to_dict(), vision_config={**vision, "out_hidden_size": 32}
    )
    model = transformers.Qwen3_5ForConditionalGeneration(config)
    state = {
        name.replace("model.", "model.language_model.", 1): x
        for name, x in text.state_dict().items()
    }
    model.load_state_dict(state, strict=False)
    tensors = model.state_dict() | {"mtp.fc.weight": next(iter(state.values())).clone()}
    model.save_pretrained(tmp_path / "all", state_dict=tensors)
    ours, alone = (flm.Backbone.from_preset(tmp_path / name) for name in ("all", "text"))
    for own, theirs in zip(ours.variables, alone.variables, strict=True):
        np.testing.assert_array_equal(own, theirs, err_msg=own.path)
