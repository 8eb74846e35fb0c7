"""Configs that nobody wrote: those of the list with some numbers changed at random.

Where Transformers makes a model of one, ours computes the same, or says what it cannot read. Other
seeds, and more of each: `FLM_SEED=7 FLM_CONFIGS=20`.
"""

import copy
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers

import functional_llm as flm
from configs import CONFIGS
from functional_llm.layers.cache import make_cache
from pair import compiled, random_tokens
from reference import make_reference, reference_logits

SEED, COUNT = (int(os.environ.get(f"FLM_{x}", 2)) for x in ("SEED", "CONFIGS"))
FAMILIES = sorted({config["model_type"] for config in CONFIGS.values()})
LENGTH, PADDED = 45, 7
# What has no effect on logits, or is the same for all tiny models.
_LEFT_ALONE = {
    *("vocab_size", "transformers_version", "architectures", "dtype", "torch_dtype", "model_type"),
    *("use_cache", "return_dict", "output_hidden_states", "output_attentions", "initializer_range"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "id2label", "label2id", "problem_type"),
    *("time_step_min", "time_step_max", "time_step_floor", "is_encoder_decoder"),
    *("output_router_logits", "router_aux_loss_coef", "router_jitter_noise", "scan_implementation"),
}
_ACTIVATIONS = ("silu", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "quick_gelu", "relu2")
_LARGEST = 2000  # of numbers that are no position: models stay tiny


def _changed(value: Any, key: str, dice: random.Random) -> Any:
    """Returns another value of the same kind; the same if there is none."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        near = [value + 1, value - 1, value * 2, value // 2]
        return max(1, dice.choice([*near, 1, 2, 3, 4, 8, 12, 24]))
    if isinstance(value, float):
        return dice.choice([value * 2, value / 2, value * 1.3, 1.0])
    if isinstance(value, str) and "act" in key:
        return dice.choice(_ACTIVATIONS)
    if isinstance(value, list):
        return dice.sample(value, len(value))
    if isinstance(value, dict) and value:
        inner = dice.choice(sorted(value))
        return {**value, inner: _changed(value[inner], inner, dice)}
    return value


def _unseen(family: str, dice: random.Random) -> dict[str, Any]:
    """Returns a config of a family with up to three changes, some from its other configs."""
    bases = [config for config in CONFIGS.values() if config["model_type"] == family]
    config = copy.deepcopy(dice.choice(bases))
    whole = transformers.AutoConfig.for_model(**copy.deepcopy(config)).to_dict()
    keys = sorted({*whole} - _LEFT_ALONE)
    for _ in range(dice.choice([1, 1, 2, 2, 3])):
        other, key = dice.choice(bases), dice.choice(keys)
        if dice.random() < 0.25 and key in other:
            value = copy.deepcopy(other[key])
        else:
            value = _changed(config.get(key, whole[key]), key, dice)
        is_position = isinstance(value, dict) or "position" in key or "theta" in key
        if is_position or not isinstance(value, int) or value <= _LARGEST:
            config[key] = value
    return config


@pytest.mark.nightly
@pytest.mark.filterwarnings("ignore")  # Transformers says what it thinks of such numbers
@pytest.mark.parametrize("number", range(COUNT))
@pytest.mark.parametrize("family", FAMILIES)
def test_a_config_that_nobody_wrote(family: str, number: int, tmp_path: Path) -> None:
    config = _unseen(family, random.Random(f"{family} {SEED} {number}"))
    token_ids = random_tokens(2, LENGTH)
    try:
        reference = make_reference(config)
        expected = reference_logits(reference, token_ids)
        padded = reference_logits(reference, token_ids[:1, PADDED:])
    except Exception as error:
        pytest.skip(f"Transformers makes no model of it: {error}"[:200])
    if not np.isfinite(expected).all():
        pytest.skip("Transformers computes no numbers")
    reference.save_pretrained(tmp_path)
    try:
        backbone = flm.Backbone.from_preset(tmp_path)
    except ValueError as error:
        pytest.skip(f"cannot be read, and says why: {error}"[:200])
    run, atol = compiled(backbone), 2e-4 * max(1.0, np.abs(expected).max())
    np.testing.assert_allclose(run(token_ids), expected, atol=atol, rtol=0, err_msg=str(config))
    positions = np.arange(LENGTH)[None].repeat(2, axis=0) - PADDED * np.array([[1], [0]])
    inputs = {"token_ids": token_ids, "positions": np.maximum(positions, -1)}
    logits = run({**inputs, "cache": make_cache(backbone, 2, 64)})["logits"]
    np.testing.assert_allclose(logits[0, PADDED:], padded[0], atol=atol, rtol=0)
    np.testing.assert_allclose(logits[1], expected[1], atol=atol, rtol=0)
