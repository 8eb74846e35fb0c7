"""Phi-3.5-MoE: how its routers choose while they train, and its RoPE in long texts."""

from collections import defaultdict
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
from transformers.models.phimoe.modeling_phimoe import sparsemixer

import functional_llm as flm
from configs import CONFIGS
from functional_llm.backbones.families import FAMILIES
from functional_llm.formats.hf_config import read_config
from functional_llm.layers.sparse_mixer import SampledMixer
from reference import make_reference, reference_logits, save_reference

NOISE, DRAWS = 0.2, 6000
# Four are near the best; of the others, three are near the best of those.
SCORES = np.array([1.0, 0.9, 0.75, 0.64, -0.3, 0.2], "float32")
# How the two weights count in a loss: what reaches the scores is told apart.
COUNTS = np.array([1.0, 10.0], "float32")


def _outcomes(experts: Any, weights: Any, gradients: Any) -> dict[Any, list[np.ndarray]]:
    """Returns weights and gradients for each pair of experts, and each part of their weights."""
    found = defaultdict(list)
    for pair, weight, gradient in zip(experts, weights, gradients, strict=True):
        found[tuple(pair)].append(np.concatenate([weight, gradient]))
    kinds = defaultdict(list)
    for pair, rows in found.items():
        whole = np.max(rows, axis=0)[:2]
        for row in rows:
            kinds[pair, *(bool(x) for x in row[:2] > 0.5 * whole)].append(row)
    return kinds


def _theirs() -> dict[Any, list[np.ndarray]]:
    torch.manual_seed(0)
    scores = torch.tensor(np.tile(SCORES, (DRAWS, 1)), requires_grad=True)
    weights, experts = sparsemixer(scores, NOISE, training=True)
    (weights * torch.tensor(COUNTS)).sum().backward()
    assert scores.grad is not None
    return _outcomes(experts.tolist(), weights.detach().numpy(), scores.grad.numpy())


def _ours() -> dict[Any, list[np.ndarray]]:
    mixer = SampledMixer(NOISE, seed=0)
    scores = np.tile(SCORES, (1, DRAWS, 1))

    def loss(scores: jax.Array) -> Any:
        chosen = mixer(scores, training=True)
        return (chosen["weights"] * COUNTS).sum(), chosen

    gradients, chosen = jax.grad(loss, has_aux=True)(scores)
    return _outcomes(np.asarray(chosen["experts"][0]).tolist(), chosen["weights"][0], gradients[0])


def test_what_training_draws_and_its_gradients_are_those_of_transformers() -> None:
    ours, theirs = _ours(), _theirs()
    assert len(theirs) > 20
    for kind in ours.keys() | theirs.keys():
        counts = [len(rows.get(kind, ())) for rows in (ours, theirs)]
        assert abs(counts[0] - counts[1]) < 5 * np.sqrt(sum(counts)), kind  # about five deviations
        if all(counts):  # theirs counts 0.3333 for a third
            np.testing.assert_allclose(ours[kind][0], theirs[kind][0], rtol=2e-4, atol=1e-6)


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder: Path = tmp_path_factory.mktemp("phimoe")
    save_reference({**CONFIGS["phimoe_near_experts"], "num_hidden_layers": 1}, folder)
    return flm.Backbone.from_preset(folder)


def test_a_model_that_draws_experts_trains_the_one_it_was_made_of(backbone: Any) -> None:
    ids = np.random.default_rng(0).integers(0, 100, (2, 11)).astype("int32")
    drawing = flm.training.draw_experts(backbone, input_noise=0.1, seed=0)
    expected = np.asarray(backbone(ids))
    np.testing.assert_array_equal(drawing(ids), expected)
    trained = [np.asarray(drawing(ids, training=True)) for _ in range(2)]
    assert np.abs(trained[0] - expected).max() > 1e-3
    assert np.abs(trained[0] - trained[1]).max() > 1e-3
    np.testing.assert_array_equal(backbone(ids, training=True), expected)
    assert {id(v) for v in drawing.trainable_variables} == {
        id(v) for v in backbone.trainable_variables
    }


def test_models_whose_routers_do_not_draw() -> None:
    family = FAMILIES["mixtral"]
    config = read_config(CONFIGS["mixtral_two_of_five"], family)
    model = flm.Backbone(*family.build(config), config=config)
    with pytest.raises(ValueError, match="one expert after the other"):
        flm.training.draw_experts(model)


def test_long_texts_turn_by_the_long_factors(tmp_path: Path) -> None:
    """Microsoft's own code does; Transformers 5.23 takes the short ones, and the long magnitude."""
    config = {**CONFIGS["phimoe_long_texts_magnitudes"], "num_hidden_layers": 1}
    rope = {**config["rope_parameters"], "original_max_position_embeddings": 12}
    long = [1.2, 2.0, 5.0, 9.0]
    reference = save_reference(
        {**config, "rope_parameters": {**rope, "long_factor": long}}, tmp_path
    )
    backbone = flm.Backbone.from_preset(tmp_path)
    as_short = make_reference({**config, "rope_parameters": {**rope, "short_factor": long}})
    as_short.load_state_dict(reference.state_dict())
    ids = np.random.default_rng(0).integers(0, 100, (2, 13)).astype("int32")
    positions = np.where(np.arange(13) < [[12], [13]], np.arange(13), -1).astype("int32")
    short, long_one = np.asarray(backbone({"token_ids": ids, "positions": positions}))
    np.testing.assert_allclose(short[:12], reference_logits(reference, ids[:1, :12])[0], atol=1e-4)
    np.testing.assert_allclose(long_one, reference_logits(as_short, ids[1:])[0], atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts_per_tok": 3}, "num_experts_per_tok to be 2.*Received: 3"),
        ({"num_local_experts": 1}, "from 1 to num_local_experts. Received: 2 and 1"),
        ({"tie_word_embeddings": True}, "false where lm_head_bias is true"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "unknown rope_type='linear'"),
        (
            {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0] * 4}},
            "lack .*short_mscale, long_mscale",
        ),
    ],
)
def test_numbers_that_make_no_model(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_config({**CONFIGS["phimoe_near_experts"], **changes}, FAMILIES["phimoe"])
