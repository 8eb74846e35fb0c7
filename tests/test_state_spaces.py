"""The state space of Mamba-2: one token after another is the law. Configs of Nemotron-H."""

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
from functional_llm.layers.state_space import CHUNK, StateSpace
from pair import compiled
from reference import reference_logits, save_reference

ROWS, LENGTH, GROUPS, HEADS, SIZE, STATE = 2, 3 * CHUNK + 9, 2, 3, 4, 5


def _inputs(length: int = LENGTH, dtype: str = "float32") -> dict[str, Any]:
    random = np.random.default_rng(0)

    def normal(*shape: int) -> Any:
        return jnp.asarray(random.normal(size=(ROWS, *shape)), dtype)

    return {
        "x": normal(length, GROUPS, HEADS, SIZE),
        "dt": normal(length, GROUPS, HEADS),
        "b": normal(length, GROUPS, STATE),
        "c": normal(length, GROUPS, STATE),
        "state": normal(GROUPS * HEADS, SIZE, STATE).astype("float32"),
        "positions": np.arange(length, dtype="int32")[None].repeat(ROWS, axis=0),
        "segment_ids": None,
    }


def _layer(*steps: Any) -> StateSpace:
    layer = StateSpace(*steps)
    layer.build({"state": (None, GROUPS * HEADS, SIZE, STATE)})
    random = np.random.default_rng(1)
    for weight in layer.weights:
        weight.assign(random.normal(size=weight.shape))
    return layer


def _one_by_one(layer: StateSpace, inputs: Any, least: float, most: float) -> tuple[Any, Any]:
    """The recurrence as the paper writes it; padding changes no state."""
    given = {key: np.asarray(x, "float64") for key, x in inputs.items() if x is not None}
    a_log, d, bias = (np.asarray(w).reshape(GROUPS, HEADS) for w in layer.weights)
    state = given["state"].reshape(ROWS, GROUPS, HEADS, SIZE, STATE)
    outputs = np.zeros_like(given["x"])
    for t in range(given["x"].shape[1]):
        dt = np.clip(np.logaddexp(given["dt"][:, t] + bias, 0), least, most)
        dt = np.where(given["positions"][:, t, None, None] < 0, 0, dt)[..., None]
        x, b, c = (given[name][:, t] for name in ("x", "b", "c"))
        if "segment_ids" in given and t:
            is_new = given["segment_ids"][:, t] != given["segment_ids"][:, t - 1]
            state = np.where(is_new[:, None, None, None, None], 0, state)
        decay = np.exp(-np.exp(a_log)[..., None] * dt)[..., None]
        state = decay * state + (dt * x)[..., None] * b[:, :, None, None]
        outputs[:, t] = (state * c[:, :, None, None]).sum(-1) + d[..., None] * x
    return outputs, state.reshape(ROWS, -1, SIZE, STATE)


@pytest.mark.parametrize("case", ["plain", "clamped", "padded", "packed"])
def test_chunks_and_one_chunk_equal_token_by_token(case: str) -> None:
    steps = (0.4, 0.9) if case == "clamped" else (0.0, None)
    layer, inputs = _layer(*steps), _inputs()
    if case == "padded":
        inputs["positions"][0, 100:] = -1
        inputs["positions"][1, :1] = -1
    if case == "packed":
        ends = [0, 1, CHUNK, CHUNK + 1, 2 * CHUNK + 30, LENGTH]
        inputs["segment_ids"] = np.repeat(np.arange(5), np.diff(ends))[None].repeat(ROWS, axis=0)
    expected = _one_by_one(layer, inputs, steps[0], steps[1] or np.inf)
    is_token = inputs["positions"] >= 0
    for form in (layer.call, layer.as_one_chunk):
        result = jax.jit(form)(inputs)
        np.testing.assert_allclose(
            np.asarray(result["x"])[is_token], expected[0][is_token], atol=2e-4, rtol=1e-4
        )
        np.testing.assert_allclose(result["state"], expected[1], atol=2e-4, rtol=1e-4)


def test_gradients_in_bfloat16_at_2048_tokens_are_finite() -> None:
    layer, inputs = _layer(), _inputs(2048, "bfloat16")
    layer.a_log.assign(np.full(GROUPS * HEADS, 5.0))  # decays that are zero within few tokens
    floats = {key: x for key, x in inputs.items() if key not in ("positions", "segment_ids")}

    def total(weights: Any, floats: Any) -> Any:
        result = layer.stateless_call(weights, [], {**inputs, **floats})[0]
        return jnp.sum(jnp.square(result["x"].astype("float32")))

    weights = [v.value for v in layer.trainable_variables]
    gradients = jax.jit(jax.grad(total, argnums=(0, 1)))(weights, floats)
    for x in jax.tree.leaves(gradients):
        assert np.isfinite(np.asarray(x, "float32")).all()
    assert gradients[1]["x"].dtype == "bfloat16"
    assert all(np.abs(np.asarray(x, "float32")).max() > 0 for x in gradients[0])


@pytest.mark.parametrize("limit", [[0.0, float("inf")], [0.1, 0.3]])
def test_steps_of_nemotron_h_have_the_bounds_of_its_limit_alone(
    tmp_path: Path, limit: list[float]
) -> None:
    """As in NVIDIA's code and in training; Transformers 5.23 takes another bound for prompts.

    https://github.com/huggingface/transformers/pull/48989 has the figures of published models.
    """
    config = {
        **CONFIGS["nemotron_h_mlp_first_states_last"],
        "time_step_min": 0.5,
        "time_step_limit": limit,
    }
    reference = save_reference(config, tmp_path)
    ids = np.random.default_rng(0).integers(0, 128, (2, 24))
    logits = compiled(flm.Backbone.from_preset(tmp_path))(ids)
    assert np.abs(logits - reference_logits(reference, ids)).max() > 1e-3
    for layer in reference.model.layers:
        layer.mixer.time_step_limit = tuple(limit)
    np.testing.assert_allclose(logits, reference_logits(reference, ids), atol=1e-4, rtol=0)


FOUR = CONFIGS["nemotron_h_four_mixers"]


def test_layers_of_nemotron_h_as_files_have_named_them() -> None:
    expected: Any = read_config(FOUR, FAMILIES["nemotron_h"])
    kinds = ["full_attention", "linear_attention", "mlp", "moe"]
    assert expected.layer_types == tuple(kinds)
    without = {key: x for key, x in FOUR.items() if key != "hybrid_override_pattern"}
    old = {
        "layers_block_type": ["attention", "mamba", "mlp", "moe"],
        "mamba_n_groups": 3,
        "attention_head_dim": 12,
        "rms_norm_eps": 1e-5,
        "num_hidden_layers": 4,
    }
    for keys in ({**without, **old}, {**without, "layer_types": kinds}, {**FOUR, **old}):
        assert read_config(keys, FAMILIES["nemotron_h"]) == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 5}, "layer_types of 5 words .* received 4"),
        ({"hybrid_override_pattern": "*MX"}, "of the letters [*]M-E, received .'X'"),
        ({"layers_block_type": ["mamba"]}, "layers_block_type to say the same, received '[*]M-E'"),
        ({"hybrid_override_pattern": None}, "lacks the keys .*num_hidden_layers"),
        (
            {"hybrid_override_pattern": None, "layers_block_type": ["mamba", "conv"]},
            "unknown ones: .'conv'",
        ),
        ({"hybrid_override_pattern": 4, "num_hidden_layers": 4}, "pattern, received 4"),
        ({"n_groups": 4}, "share an inner width of 48, and are a multiple of n_groups"),
        ({"num_experts_per_tok": 4}, "num_experts_per_tok experts at most in those"),
        ({"attention_bias": True}, "attention_bias=True .expected False"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings=True .expected False"),
        ({"time_step_limit": [1.0]}, "a time_step_limit of two numbers"),
    ],
)
def test_configs_of_nemotron_h_that_do_not_fit(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_config({**FOUR, **changes}, FAMILIES["nemotron_h"])
