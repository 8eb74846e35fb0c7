"""ALiBi: slopes, and their products with positions as Falcon rounds them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.models.bloom.modeling_bloom import build_alibi_tensor as bloom_alibi
from transformers.models.falcon.modeling_falcon import build_alibi_tensor as falcon_alibi

from configs import CONFIGS
from functional_llm.backbones.families import FAMILIES
from functional_llm.blocks.alibi import alibi_key
from functional_llm.blocks.attention import alibi_slopes
from functional_llm.formats.hf_config import read_config, write_config


def test_slopes_are_those_of_transformers_for_any_number_of_heads() -> None:
    two = torch.ones(1, 2, dtype=torch.long)  # the second token's position is 1
    for heads in range(1, 140):
        expected = bloom_alibi(two, heads, torch.float32)[:, 0, 1]
        np.testing.assert_allclose(alibi_slopes(heads), expected, rtol=1e-6, atol=0)


def test_a_compiled_key_has_falcons_rounded_products() -> None:
    heads, length = 12, 2048
    expected = falcon_alibi(torch.ones(1, length, dtype=torch.long), heads, torch.float32)
    x = jnp.zeros((1, length, heads, 0))
    part = jax.jit(lambda x, positions: alibi_key(heads)(x, {"positions": positions}))
    received = part(x, jnp.arange(length)[None])[0, :, :, 0].T
    np.testing.assert_array_equal(received, expected[:, 0])


@pytest.mark.parametrize(
    "keys",
    [
        {"new_decoder_architecture": True, "parallel_attn": False},
        {"new_decoder_architecture": True, "num_ln_in_parallel_attn": 3},
        {"num_ln_in_parallel_attn": 2},
        {"multi_query": False},
        {"new_decoder_architecture": True, "alibi": True},
        {"alibi": True},
    ],
)
def test_designs_that_transformers_cannot_run_or_nobody_has_are_refused(
    keys: dict[str, Any],
) -> None:
    config = CONFIGS["falcon_multi_query_untied"] | {"num_kv_heads": 2} | keys
    with pytest.raises(ValueError, match="expected keys of one design. Received: {'new_decoder_a"):
        read_config(config, FAMILIES["falcon"])


def test_old_names_of_falcons_keys_mean_the_same() -> None:
    config, family = CONFIGS["falcon_grouped_two_norms"], FAMILIES["falcon"]
    old = {alias: config[key] for alias, key in family.config_aliases.items()}
    rest = {key: x for key, x in config.items() if key not in family.config_aliases.values()}
    assert read_config(rest | old, family) == read_config(config, family)
    written = write_config(read_config(config, family), family, "float32")
    assert written["new_decoder_architecture"] and written["num_kv_heads"] == 2
