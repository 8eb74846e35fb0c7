"""The one list of tiny configs that the property tests run over.

An entry is the Transformers config of a random-weight model, under a name that says what is odd
about it, in the module of its kin. A new family or a new part joins there and gets every test.

One more takes 1 s of a core (CPU seconds, two layers, programs kept from an earlier run). The first
of a family gets what ONE_OF_EACH_FAMILY is for, too, a stock file on one backend among it: 8 s in
all. One that joins ONE_OF_EACH_KIND takes 20 s more. `make nightly` takes all for all
(tests/nightly.py).
"""

from typing import Any

from configs import (
    chunked,
    corrected,
    delta_nets,
    experts,
    gpt_oss,
    latents,
    layer_norm,
    llama_kin,
    sandwich,
    shared_keys,
    state_spaces,
    states,
)

CONFIGS: dict[str, dict[str, Any]] = {
    **llama_kin.CONFIGS,
    **sandwich.CONFIGS,
    **layer_norm.CONFIGS,
    **experts.CONFIGS,
    **gpt_oss.CONFIGS,
    **latents.CONFIGS,
    **corrected.CONFIGS,
    **chunked.CONFIGS,
    **states.CONFIGS,
    **delta_nets.CONFIGS,
    **shared_keys.CONFIGS,
    **state_spaces.CONFIGS,
}
# The first config of each family, for what no config changes.
ONE_OF_EACH_FAMILY = list({x["model_type"]: name for name, x in reversed(CONFIGS.items())}.values())
# One config for each kind of part, for what compiles and trains: adapters, int8, generation, stock
# files on three backends. Such numbers differ with parts, not with families. A new kind of layer or
# of tensor joins here: test_properties.py says what is missing.
ONE_OF_EACH_KIND = [
    "llama_grouped",  # the plain one: RMSNorm, gated MLP, RoPE, a head of its own, no bias
    "qwen2_tied",  # biases on some projections, the head is the embedding
    "gemma2_soft_caps",  # rings beside a full cache, soft caps, norms behind branches, scale 1 + w
    "gemma3_two_ropes",  # norms of queries and keys, a RoPE a type of layers
    "gpt2_tied",  # fused tensors, kernels as (in, out), learned positions, LayerNorm, a plain MLP
    "cohere_query_key_norm_untied",  # pairs turn, LayerNorm without a bias, a weight of each head
    "stablelm_norm_of_each_head",  # a tensor for each head
    "apertus_default_rope",  # a learned activation, variables that do not train
    "gptj_half_of_each_head",  # one norm for both branches, a head with a bias, some channels turn
    "gpt_neox_no_biases_tied",  # tensors fused in groups, one for each head
    "phi3_long_texts",  # fused tensors, transposed; a RoPE that depends on the longest row
    "bloom_five_heads",  # ALiBi
    "qwen3_moe_some_dense",  # experts
    "gpt_oss_clamped",  # sinks, experts with biases and a clamp, gate and up by turns
    "deepseek_v3_groups",  # latents in the cache, a shared expert, a correction of scores
    "llama4_chunks_then_all",  # layers that see chunks, experts in fused tensors
    "lfm2_wide_kernel",  # a state in the place of keys and values
    "qwen3_5_grouped_values",  # gated delta nets, attention with a gate
    "gemma4_shared_keys",  # layers look at the keys of others, embeddings for each layer
    "mamba2_groups",  # a state that decays, a norm of groups
    "mamba_default_rank",  # a state that goes from token to token
    "rwkv7_three_heads",  # the same, of matrices; a first layer that lends its values
]
