"""Faults to put into the library, each with the property tests that must see it.

As a pytest plugin (`-p mutations`) it puts in the one that FLM_MUTATION names, in its process only.
"""

import dataclasses
import importlib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest


@dataclass(frozen=True)
class Mutation:
    """A fault.

    Args:
        put_in: Patches the library.
        config: The name of the config, or other words, that choose the tests to run.
        caught_by: Names of tests that must fail.
        file: Where these tests are.
    """

    put_in: Callable[[pytest.MonkeyPatch], None]
    config: str
    caught_by: tuple[str, ...]
    file: str = "test_properties.py"


MUTATIONS: dict[str, Mutation] = {}
LOGITS = "test_logits_equal_the_reference"
CHUNKS = "test_chunks_through_the_cache_equal_the_full_forward"
RAGGED = "test_ragged_rows_equal_each_row_alone"
CACHE = "test_a_cache_keeps_no_more_than_its_windows_in_the_models_dtype"
INFLUENCE = "test_influence"
PACKED = "test_packed_segments_do_not_see_each_other"
MASK = "test_a_mask_of_ones_own_equals_the_reference_and_goes_through_the_cache"
TABLE = "test_table_there_and_back_is_the_identity"
PRESET = "test_transformers_loads_what_save_preset_wrote"
STOCK = "test_stock_keras_computes_the_same"


def _on(config: str, *caught_by: str, file: str = "test_properties.py") -> Any:
    def register(put_in: Callable[[pytest.MonkeyPatch], None]) -> None:
        name = put_in.__name__.strip("_")
        MUTATIONS[name] = Mutation(put_in, config, caught_by, file)

    return register


def pytest_sessionstart() -> None:
    if "FLM_MUTATION" in os.environ:
        importlib.import_module("functional_llm.presets.backbone")  # for `_replace` to find all
        MUTATIONS[os.environ["FLM_MUTATION"]].put_in(pytest.MonkeyPatch())


def _replace_inputs(patch: pytest.MonkeyPatch, cls: Any, change: Callable[[Any, Any], Any]) -> None:
    """Lets a layer's `call` receive `change(layer, inputs)`."""
    call = cls.call
    patch.setattr(cls, "call", lambda layer, inputs: call(layer, change(layer, inputs)))


def _replace(patch: pytest.MonkeyPatch, function: Any, other: Any) -> None:
    """Puts another function in the place of one, in every module of the library that calls it."""
    for name, module in list(sys.modules.items()):
        if name.startswith("functional_llm"):
            for key, value in list(vars(module).items()):
                if value is function:
                    patch.setattr(module, key, other)


def _with_attribute(patch: pytest.MonkeyPatch, cls: Any, name: str, change: Any) -> None:
    """Lets a layer be made as if another number had been given."""
    made = cls.__init__

    def make(layer: Any, *args: Any, **kwargs: Any) -> None:
        made(layer, *args, **kwargs)
        setattr(layer, name, change(getattr(layer, name)))

    patch.setattr(cls, "__init__", make)


def _in_family(patch: pytest.MonkeyPatch, name: str, **changes: Any) -> None:
    """Changes fields of a family."""
    from functional_llm.backbones.families import FAMILIES

    family = FAMILIES[name]
    new = {field: change(getattr(family, field)) for field, change in changes.items()}
    patch.setitem(FAMILIES, name, dataclasses.replace(family, **new))


# Parts in another order ----------------------------------------------------------------------


def _norm_after_rope(patch: pytest.MonkeyPatch, module: Any) -> None:
    """Swaps the last two parts of queries and of keys in a family's decoder layers."""
    made = module.attention

    def swapped(parts: list[Any]) -> list[Any]:
        projection, norm, rope = parts
        return [projection, rope, norm]

    def make(query: list[Any], key: list[Any], **rest: Any) -> Any:
        return made(query=swapped(query), key=swapped(key), **rest)

    patch.setattr(module, "attention", make)


@_on("qwen3_head_size", LOGITS)
def norm_after_rope_in_qwen3(patch: pytest.MonkeyPatch) -> None:
    from functional_llm.backbones import qwen3

    _norm_after_rope(patch, qwen3)


@_on("gemma3_two_ropes", LOGITS)
def norm_after_rope_in_gemma3(patch: pytest.MonkeyPatch) -> None:
    from functional_llm.backbones import gemma3

    _norm_after_rope(patch, gemma3)


@_on("gemma2_soft_caps", LOGITS)
def no_norm_behind_the_branches(patch: pytest.MonkeyPatch) -> None:
    import keras

    call = keras.layers.RMSNormalization.call
    patch.setattr(
        keras.layers.RMSNormalization,
        "call",
        lambda layer, x: x if layer.name.endswith("post_norm") else call(layer, x),
    )


# Attention -----------------------------------------------------------------------------------


def _wider(window: int | None) -> int | None:
    return None if window is None else window + 1


def _narrower(window: int | None) -> int | None:
    return None if window is None else window - 1


@_on("gpt_oss_clamped", LOGITS)
def no_sinks(patch: pytest.MonkeyPatch) -> None:
    from functional_llm.layers.attention import AttentionDotProduct

    _replace_inputs(patch, AttentionDotProduct, lambda layer, inputs: {**inputs, "sinks": None})


@_on("gpt_oss_clamped", LOGITS)
def experts_that_are_not_clamped(patch: pytest.MonkeyPatch) -> None:
    from functional_llm.blocks.experts import clamped

    _replace(patch, clamped, lambda alpha, limit: clamped(alpha, 20.0 * limit))


@_on("gpt_oss_clamped", LOGITS)
def yarn_that_rounds(patch: pytest.MonkeyPatch) -> None:
    from functional_llm.blocks.rope_scaling import YarnScaling

    right = YarnScaling.frequencies

    def wrong(scaling: YarnScaling, *args: Any) -> Any:
        return right(dataclasses.replace(scaling, truncate=True), *args)

    patch.setattr(YarnScaling, "frequencies", wrong)


@_on("mistral_window", LOGITS, INFLUENCE)
def window_wider_by_one(patch: pytest.MonkeyPatch) -> None:
    from functional_llm.layers.attention import AttentionMask

    _with_attribute(patch, AttentionMask, "window", _wider)


@_on("qwen3_biases_slide_multi_query", LOGITS, INFLUENCE)
def window_narrower_by_one(patch: pytest.MonkeyPatch) -> None:
    from functional_llm.layers.attention import AttentionMask

    _with_attribute(patch, AttentionMask, "window", _narrower)


@_on("gemma2_soft_caps", LOGITS)
def windows_in_the_other_layers(patch: pytest.MonkeyPatch) -> None:
    others = {"full_attention": "sliding_attention", "sliding_attention": "full_attention"}

    def swap(complete: Any) -> Any:
        def swapped(keys: Any) -> Any:
            full = complete(keys)
            return {**full, "layer_types": [others[kind] for kind in full["layer_types"]]}

        return swapped

    _in_family(patch, "gemma2", complete_keys=swap)


@_on("llama_grouped", LOGITS, INFLUENCE)
def a_token_sees_the_next_one(patch: pytest.MonkeyPatch) -> None:
    from functional_llm.layers.attention import AttentionMask

    def change(layer: Any, inputs: Any) -> Any:
        return {**inputs, "query_positions": inputs["query_positions"] + 1}

    _replace_inputs(patch, AttentionMask, change)


@_on("llama_grouped", RAGGED, PACKED)
def padding_is_seen(patch: pytest.MonkeyPatch) -> None:
    from keras import ops

    from functional_llm.layers.attention import AttentionMask

    def change(layer: Any, inputs: Any) -> Any:
        return {**inputs, "slot_positions": ops.maximum(inputs["slot_positions"], 0)}

    _replace_inputs(patch, AttentionMask, change)


@_on("gpt2_tied", PACKED)
def segments_are_seen(patch: pytest.MonkeyPatch) -> None:
    from functional_llm.layers.attention import AttentionMask

    _replace_inputs(patch, AttentionMask, lambda layer, inputs: {**inputs, "segment_ids": None})


@_on("gpt2_tied", MASK)
def masks_of_ones_own_are_dropped(patch: pytest.MonkeyPatch) -> None:
    from functional_llm.layers.attention import AttentionMask

    _replace_inputs(patch, AttentionMask, lambda layer, inputs: {**inputs, "mask": None})


@_on("gemma2_soft_caps", LOGITS)
def no_soft_cap_on_scores(patch: pytest.MonkeyPatch) -> None:
    from functional_llm.layers.attention import AttentionDotProduct

    _with_attribute(patch, AttentionDotProduct, "soft_cap", lambda cap: None)


@_on("gemma3_one_layer_capped", LOGITS)
def no_soft_cap_on_logits(patch: pytest.MonkeyPatch) -> None:
    from functional_llm.blocks.language_model import soft_cap

    _replace(patch, soft_cap, lambda bound: lambda x, inputs: x)


@_on("gemma3_two_ropes", LOGITS)
def scale_of_scores_by_head_size(patch: pytest.MonkeyPatch) -> None:
    from functional_llm.layers.attention import AttentionDotProduct

    _with_attribute(patch, AttentionDotProduct, "scale", lambda scale: None)


@_on("llama_head_size", LOGITS)
def scale_of_scores_by_share_of_model(patch: pytest.MonkeyPatch) -> None:
    from functional_llm.layers.attention import AttentionDotProduct

    _with_attribute(patch, AttentionDotProduct, "scale", lambda scale: (48 / 6) ** -0.5)


@_on("llama_grouped", LOGITS)
def key_heads_in_turn(patch: pytest.MonkeyPatch) -> None:
    from keras import ops

    from functional_llm.layers.attention import AttentionDotProduct

    def change(layer: Any, inputs: Any) -> Any:
        return {**inputs, "query": ops.roll(inputs["query"], 1, axis=2)}

    _replace_inputs(patch, AttentionDotProduct, change)


# Positions -----------------------------------------------------------------------------------


def _other_rope(patch: pytest.MonkeyPatch, **changes: Any) -> None:
    """Lets rotations be of a RoPE with other fields."""
    from functional_llm.blocks.rope import rotation

    def make(positions: Any, rope: Any) -> Any:
        new = {field: change(getattr(rope, field)) for field, change in changes.items()}
        return rotation(positions, dataclasses.replace(rope, **new))

    _replace(patch, rotation, make)


@_on("llama_grouped", LOGITS)
def theta_larger_by_a_hundredth(patch: pytest.MonkeyPatch) -> None:
    _other_rope(patch, max_wavelength=lambda theta: theta * 1.01)


@_on("gemma3_two_ropes", LOGITS)
def one_theta_for_all_layers(patch: pytest.MonkeyPatch) -> None:
    _other_rope(patch, max_wavelength=lambda theta: 50000.0)


@_on("llama_llama3", LOGITS)
def no_llama3_scaling(patch: pytest.MonkeyPatch) -> None:
    _other_rope(patch, scaling=lambda scaling: None)


@_on("llama_yarn", LOGITS)
def no_magnitude_of_yarn(patch: pytest.MonkeyPatch) -> None:
    _other_rope(patch, scaling=lambda scaling: dataclasses.replace(scaling, attention_factor=1.0))


@_on("llama_linear", LOGITS)
def factor_of_linear_scaling(patch: pytest.MonkeyPatch) -> None:
    _other_rope(patch, scaling=lambda scaling: dataclasses.replace(scaling, factor=4.1))


@_on("gpt2_tied", LOGITS)
def learned_positions_from_one_on(patch: pytest.MonkeyPatch) -> None:
    import keras

    call = keras.layers.Embedding.call

    def shifted(layer: Any, x: Any) -> Any:
        return call(layer, x + 1 if layer.name == "position_embedding" else x)

    patch.setattr(keras.layers.Embedding, "call", shifted)


@_on("llama_grouped", CHUNKS, RAGGED)
def every_chunk_begins_at_position_zero(patch: pytest.MonkeyPatch) -> None:
    from functional_llm.layers.cache import latest_position

    _replace(patch, latest_position, lambda cache: latest_position(cache) * 0 - 1)


# The cache -----------------------------------------------------------------------------------


def _next_slot(patch: pytest.MonkeyPatch, when: Callable[[int], bool]) -> None:
    """Stores tokens one slot too far in calls with so many tokens."""
    from keras import ops

    from functional_llm.layers.attention import KVCacheLookup

    call = KVCacheLookup.call

    def wrong(layer: Any, inputs: Any) -> Any:
        visible, updated = call(layer, inputs)
        positions = inputs["positions"]
        if not when(positions.shape[1]):
            return visible, updated
        moved = ops.where(positions >= 0, positions + 1, positions)
        _, wrongly_updated = call(layer, {**inputs, "positions": moved})
        return (wrongly_updated if visible is updated else visible), wrongly_updated

    patch.setattr(KVCacheLookup, "call", wrong)


@_on("mistral_window", CHUNKS, RAGGED)
def ring_slot_of_a_chunk(patch: pytest.MonkeyPatch) -> None:
    _next_slot(patch, lambda tokens: tokens > 1)


@_on("gemma2_soft_caps", CHUNKS, RAGGED)
def ring_slot_of_one_token(patch: pytest.MonkeyPatch) -> None:
    _next_slot(patch, lambda tokens: tokens == 1)


@_on("mistral_window", CHUNKS)
def a_chunk_does_not_see_what_its_ring_loses(patch: pytest.MonkeyPatch) -> None:
    from functional_llm.layers.attention import KVCacheLookup

    call = KVCacheLookup.call

    def wrong(layer: Any, inputs: Any) -> Any:
        visible, updated = call(layer, inputs)
        return (visible if inputs["positions"].shape[1] == 1 else updated), updated

    patch.setattr(KVCacheLookup, "call", wrong)


@_on("qwen2_tied", CHUNKS, CACHE)
def cache_in_bfloat16(patch: pytest.MonkeyPatch) -> None:
    _dtype_of_the_cache(patch, "bfloat16")


@_on("qwen2_tied", "test_bfloat16_is_as_near_as_the_reference")
def cache_in_float32(patch: pytest.MonkeyPatch) -> None:
    _dtype_of_the_cache(patch, "float32")


def _dtype_of_the_cache(patch: pytest.MonkeyPatch, dtype: str) -> None:
    import keras

    made = keras.Input

    def make(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("name", "").startswith("cache") and kwargs["dtype"] != "int32":
            kwargs["dtype"] = dtype
        return made(*args, **kwargs)

    patch.setattr(keras, "Input", make)


@_on("gemma3_two_ropes", CACHE)
def windows_keep_all_slots(patch: pytest.MonkeyPatch) -> None:
    import keras

    made = keras.Input

    def make(shape: Any, **kwargs: Any) -> Any:
        is_cache = kwargs.get("name", "").startswith("cache")
        return made((None, *shape[1:]) if is_cache else shape, **kwargs)

    patch.setattr(keras, "Input", make)


# Weights -------------------------------------------------------------------------------------


def _rename(old: str, new: str) -> Callable[[Any], Any]:
    """Swaps the variables of two parts in a table of weights."""

    def swap(rows: Any) -> Any:
        names = {old: new, new: old}
        return [
            (source, "/".join(names.get(part, part) for part in target.split("/")), *rest)
            for source, target, *rest in rows
        ]

    return swap


@_on("llama_grouped", LOGITS)
def gate_and_up_swapped(patch: pytest.MonkeyPatch) -> None:
    _in_family(patch, "llama", weights=_rename("gate", "up"))


@_on("gpt2_tied", LOGITS)
def fused_query_and_key_swapped(patch: pytest.MonkeyPatch) -> None:
    _in_family(patch, "gpt2", weights=_rename("query", "key"))


@_on("llama_multi_head_tied", LOGITS)
def square_kernels_not_transposed(patch: pytest.MonkeyPatch) -> None:
    _in_family(
        patch,
        "llama",
        weights=lambda rows: [
            (source, target, "same" if target.endswith("query/kernel") else transform)
            for source, target, transform in rows
        ],
    )


@_on("llama_grouped", TABLE, PRESET)
def matrices_written_upside_down(patch: pytest.MonkeyPatch) -> None:
    from functional_llm.formats import weight_table

    transpose = weight_table.TRANSFORMS["transpose"]
    flipped = dataclasses.replace(transpose, inverse=lambda x: transpose.inverse(x)[::-1])
    patch.setitem(weight_table.TRANSFORMS, "transpose", flipped)


@_on("gemma_grouped", LOGITS)
def embedding_not_multiplied(patch: pytest.MonkeyPatch) -> None:
    from functional_llm.blocks.language_model import scale

    _replace(patch, scale, lambda factor: lambda x, inputs: x)


@_on("gemma_grouped", LOGITS)
def norms_not_offset_by_one(patch: pytest.MonkeyPatch) -> None:
    from functional_llm.blocks.norm import offset_rms_norm, rms_norm

    _replace(patch, offset_rms_norm, rms_norm)


@_on("llama_multi_head_tied", LOGITS)
def tied_head_not_tied(patch: pytest.MonkeyPatch) -> None:
    import keras
    import numpy as np
    from keras import ops

    call = keras.layers.ReversibleEmbedding.call

    def other(layer: Any, x: Any, reverse: bool = False) -> Any:
        if not reverse:
            return call(layer, x)
        matrix = np.random.default_rng(0).normal(size=(x.shape[-1], layer.input_dim)) * 0.1
        return ops.matmul(x, matrix.astype("float32"))

    patch.setattr(keras.layers.ReversibleEmbedding, "call", other)


@_on("llama_grouped", LOGITS)
def head_tied_without_being_so(patch: pytest.MonkeyPatch) -> None:
    from functional_llm.blocks.language_model import causal_lm

    def make(**arguments: Any) -> Any:
        return causal_lm(**arguments | {"tie_word_embeddings": True})

    _replace(patch, causal_lm, make)


@_on("llama_biases", LOGITS)
def exact_gelu_approximated(patch: pytest.MonkeyPatch) -> None:
    from functional_llm.blocks.mlp import ACTIVATIONS

    patch.setitem(ACTIVATIONS, "gelu", ACTIVATIONS["gelu_approximate"])


@_on("llama_grouped", PRESET)
def theta_lost_in_what_is_written(patch: pytest.MonkeyPatch) -> None:
    from functional_llm.formats.hf_config import write_config

    def wrong(*args: Any) -> Any:
        rope = {"rope_type": "default", "rope_theta": 20000.0}
        return {**write_config(*args), "rope_parameters": rope}

    _replace(patch, write_config, wrong)


# Precision, and generation -------------------------------------------------------------------


@_on("llama_grouped", "test_bfloat16_is_as_near_as_the_reference")
def angles_in_bfloat16(patch: pytest.MonkeyPatch) -> None:
    import keras
    from keras import ops

    from functional_llm.blocks.rope import rotation

    def rounded(positions: Any, rope: Any) -> Any:
        if keras.config.dtype_policy().compute_dtype == "float32":
            return rotation(positions, rope)
        angles = ops.cast(ops.expand_dims(positions, (2, 3)), "bfloat16") * rope.frequencies
        angles = ops.cast(ops.cast(angles, "bfloat16"), "float32")
        cos, sin = ops.cos(angles), ops.sin(angles)
        return {"cos": ops.concatenate([cos, cos], -1), "sin": ops.concatenate([-sin, sin], -1)}

    _replace(patch, rotation, rounded)


@_on("llama_grouped", "test_greedy_text_equals_the_reference")
def greedy_takes_the_second(patch: pytest.MonkeyPatch) -> None:
    import jax.numpy as jnp

    from functional_llm.generation.samplers import Greedy

    def second(sampler: Any, logits: Any, *others: Any) -> Any:
        return jnp.argsort(logits, axis=-1)[:, -2].astype("int32")

    patch.setattr(Greedy, "__call__", second)


@_on("llama_grouped", RAGGED, PACKED)
def a_row_keeps_the_cache_of_the_longest(patch: pytest.MonkeyPatch) -> None:
    from functional_llm.layers.attention import AttentionMask

    def change(layer: Any, inputs: Any) -> Any:
        from keras import ops

        highest = ops.max(inputs["query_positions"], axis=0, keepdims=True)
        return {**inputs, "query_positions": ops.zeros_like(inputs["query_positions"]) + highest}

    _replace_inputs(patch, AttentionMask, change)


# Other tests over the list -------------------------------------------------------------------


@_on("mistral_window", STOCK, file="test_stock_files.py")
def stock_mask_without_its_window(patch: pytest.MonkeyPatch) -> None:
    from functional_llm.layers.attention import AttentionMask
    from functional_llm.stock.lowering import register_lowering

    right = AttentionMask.call

    def wrong(layer: Any, inputs: Any) -> Any:
        layer.window = None
        return right(layer, inputs)

    register_lowering(AttentionMask, wrong)


@_on("qwen2_tied", STOCK, file="test_stock_files.py")
def stock_cache_behind_the_new_tokens(patch: pytest.MonkeyPatch) -> None:
    from keras import ops, tree

    from functional_llm.layers.attention import KVCacheLookup
    from functional_llm.stock.lowering import register_lowering

    def wrong(layer: Any, inputs: Any) -> Any:
        new, cache = inputs["new"], inputs["cache"]
        # Positions stay in their order: what only moves with its position changes nothing.
        order = 1 if isinstance(new, dict) else -1
        pairs = zip(tree.flatten(new), tree.flatten(cache), strict=True)
        return [ops.concatenate(pair[::order], axis=1) for pair in pairs], new

    register_lowering(KVCacheLookup, wrong)


@_on("llama_grouped", "test_the_way_back", file="test_stock_files.py")
def another_epsilon_on_the_way_back(patch: pytest.MonkeyPatch) -> None:
    from functional_llm.formats.hf_config import decode_config

    def wrong(*args: Any) -> Any:
        config: Any = decode_config(*args)
        return dataclasses.replace(config, layer_norm_epsilon=2e-6)

    _replace(patch, decode_config, wrong)


@_on("quantised", "test_quantised_gguf", file="test_presets.py")
def gguf_rows_not_permuted(patch: pytest.MonkeyPatch) -> None:
    _in_family(patch, "llama", gguf_permuted=lambda _: {})
