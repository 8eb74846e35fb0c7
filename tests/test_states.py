"""States in the place of keys and values: a graph by hand, of short convolutions and attention.

The law is each row alone, without padding.
"""

import functools
import json
from functools import partial
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

import functional_llm as flm
from configs import CONFIGS
from functional_llm.blocks.attention import attention, heads, key_value_shapes
from functional_llm.blocks.convolution import convolution_shapes, gated_convolution
from functional_llm.blocks.decoder import pre_norm
from functional_llm.blocks.language_model import LayerType, StateType, causal_lm
from functional_llm.blocks.mlp import gated_mlp
from functional_llm.blocks.norm import rms_norm
from functional_llm.blocks.rope import Rope, rotary
from functional_llm.generation.prompt_cache import PromptCache
from functional_llm.layers.cache import can_truncate, make_cache, token_sizes, truncate_cache
from functional_llm.presets.dtypes import dtype_policy
from pair import compiled

V, D, WIDTH, LENGTH = 64, 32, 4, 24
IDS = np.random.default_rng(0).integers(0, V, (2, LENGTH)).astype("int32")


def _build(kinds: list[str]) -> flm.Backbone:
    keras.utils.set_random_seed(0)
    layers, keeps = [], []
    for i, kind in enumerate(kinds):
        mixer = gated_convolution(WIDTH, D, use_bias=True)
        if kind == "full_attention":
            mixer = attention(
                query=[heads(4, 8, "query"), rotary()],
                key=[heads(2, 8, "key"), rotary()],
                value=[heads(2, 8, "value")],
                output=keras.layers.Dense(D, name="output"),
            )
        norm = partial(rms_norm, 1e-6)
        layers.append((kind, pre_norm(f"decoder_{i}", norm, mixer, gated_mlp(48, D, "silu"))))
        own = key_value_shapes(2, 8) if kind == "full_attention" else convolution_shapes(WIDTH, D)
        keeps.append(own)
    inputs, outputs = causal_lm(
        vocabulary_size=V,
        hidden_dim=D,
        layer_types={"conv": StateType(), "full_attention": LayerType(Rope(8, 1e4))},
        layers=layers,
        keeps=keeps,
        final_norm=rms_norm(1e-6, "final_norm"),
        tie_word_embeddings=True,
    )
    model = flm.Backbone(inputs, outputs)
    random = np.random.default_rng(1)
    for variable in model.variables:
        noise = 0.2 * random.normal(size=variable.shape)
        variable.assign((np.asarray(variable, "float32") + noise).astype(variable.dtype))
    return model


@pytest.fixture(scope="module")
def backbone() -> flm.Backbone:
    return _build(["conv", "full_attention", "conv"])


@pytest.fixture(scope="module")
def expected(backbone: flm.Backbone) -> np.ndarray:
    return np.asarray(backbone(IDS))


def _near(received: Any, expected: Any) -> None:
    np.testing.assert_allclose(received, expected, atol=3e-5, rtol=0)


def test_padding_anywhere_changes_nothing(backbone: flm.Backbone, expected: np.ndarray) -> None:
    places = np.array([np.arange(LENGTH) * 3 // 2 + 1, np.arange(LENGTH) + (np.arange(LENGTH) > 7)])
    ids, mask = np.full((2, 40), 7, "int32"), np.zeros((2, 40), int)
    np.put_along_axis(ids, places, IDS, axis=1)
    np.put_along_axis(mask, places, 1, axis=1)
    logits = np.array(backbone({"token_ids": ids, "attention_mask": mask}))
    _near(np.take_along_axis(logits, places[..., None], axis=1), expected)
    # So it does in the middle of a text, after what a cache holds.
    run, cache = compiled(backbone), make_cache(backbone, 2, 48)
    for columns in (slice(0, 13), slice(13, 14), slice(14, 15), slice(15, 40)):
        positions = np.where(mask, np.cumsum(mask, axis=1) - 1, -1)[:, columns]
        given = {"token_ids": ids[:, columns], "positions": positions, "cache": cache}
        result = run(given)
        cache, logits[:, columns] = result["cache"], result["logits"]
    _near(np.take_along_axis(logits, places[..., None], axis=1), expected)
    np.testing.assert_array_equal(cache["conv"]["positions"], [[LENGTH - 1]] * 2)


def test_segments_are_read_alone(backbone: flm.Backbone, expected: np.ndarray) -> None:
    ends = [0, 7, 8, 9, 21, LENGTH]
    segments = np.repeat(np.arange(5), np.diff(ends))[None].repeat(2, axis=0)
    positions = np.arange(LENGTH) - np.array(ends)[segments]
    inputs = {"token_ids": IDS, "positions": positions, "segment_ids": segments}
    logits = np.asarray(backbone(inputs))
    for begin, end in zip(ends, ends[1:], strict=False):
        alone = np.roll(IDS, -begin, axis=1)  # what follows a text moves nothing in it
        _near(logits[:, begin:end], np.asarray(backbone(alone))[:, : end - begin])
    positions[:, 7] = -1  # a segment that is padding, and its place between others
    inputs["positions"] = positions
    padded = np.asarray(backbone(inputs))
    _near(np.delete(padded, 7, 1), np.delete(logits, 7, 1))


def test_a_finished_row_keeps_its_state(backbone: flm.Backbone) -> None:
    cache = backbone({"token_ids": IDS[:, :9], "cache": make_cache(backbone, 2, 16)})["cache"]
    given = {"token_ids": IDS[:, 9:10], "positions": np.array([[9], [-1]]), "cache": cache}
    after = backbone(given)["cache"]["conv"]
    np.testing.assert_array_equal(after["positions"], [[9], [8]])
    for old, new in zip(keras.tree.flatten(cache["conv"]), keras.tree.flatten(after), strict=True):
        np.testing.assert_array_equal(new[1], old[1])
        assert (np.asarray(new[0]) != np.asarray(old[0])).any()


def test_states_are_float32_and_of_one_slot() -> None:
    with dtype_policy("bfloat16"):
        model = _build(["conv", "full_attention"])
    cache = make_cache(model, 2, 16)
    assert cache["conv"]["decoder_0"]["convolution"]["inputs"].shape == (2, 1, WIDTH - 1, D)
    assert cache["conv"]["decoder_0"]["convolution"]["inputs"].dtype == "float32"
    one, two = (token_sizes(model, n) for n in (1, 2))
    assert two - one == 2 * 2 * 8 * 2 + 4  # keys and values of a token, and its position


def _greedy(model: flm.Backbone, ids: list[int], count: int) -> list[int]:
    run = _program(model)
    for _ in range(count):
        padded = np.array([[*ids, *[0] * (32 - len(ids))]], "int32")
        ids = [*ids, int(np.argmax(run(padded)[0, len(ids) - 1]))]
    return ids[-count:]


_program = functools.cache(compiled)


def test_generation(backbone: flm.Backbone) -> None:
    prompts = [IDS[0, :9].tolist(), IDS[1, :3].tolist()]
    new = flm.TextGenerator(backbone).generate_ids(prompts, max_new_tokens=6)
    assert new == [_greedy(backbone, ids, 6) for ids in prompts]


def test_a_model_of_states_alone() -> None:
    model = _build(["conv", "conv"])
    generator = flm.TextGenerator(model)
    prompt = IDS[0, :5].tolist()
    new = generator.generate_ids([prompt], max_new_tokens=8)
    assert new == [_greedy(model, prompt, 8)]
    assert generator.num_compilations == 2  # a prefill, and one loop for all tokens
    assert token_sizes(model, 1) == token_sizes(model, 1000)


def test_a_conversation_goes_on_from_where_its_states_are(backbone: flm.Backbone) -> None:
    generator, past = flm.TextGenerator(backbone), PromptCache()

    def write(ids: list[int]) -> tuple[list[int], int]:
        new = [
            x for part in generator._run([ids], 5, "greedy", (), None, past) for x in part.ids[0]
        ]
        assert new == _greedy(backbone, ids, 5)
        return new, generator.stats.prefill_tokens

    prompt, more = IDS[0, :9].tolist(), IDS[1, :4].tolist()
    new, _ = write(prompt)
    new, count = write([*prompt, *new, *more])
    assert count == 1 + 4  # the last token written was in no cache
    # An answer that is spelled otherwise: on from the end of the prompt before it.
    second = [*past.ids[: -len(new) + 1], 3, 5]
    _, count = write(second)
    assert count == 2
    # Where no state was kept: read again.
    other = [*prompt[:5], 1, 2]
    _, count = write(other)
    assert count == len(other)


def test_a_state_cannot_go_back(backbone: flm.Backbone) -> None:
    result = backbone({"token_ids": IDS[:, :9], "cache": make_cache(backbone, 2, 16)})
    cache = result["cache"]
    assert can_truncate(cache, 9) and not can_truncate(cache, 8)
    with pytest.raises(ValueError, match="can be cut to 8 tokens.*they are at 9 tokens"):
        truncate_cache(cache, 8)
    positions = np.arange(5, 8)[None].repeat(2, axis=0)
    with pytest.raises(ValueError, match="rise in each row, from 9 on.*Received .5 6 7. in row 0"):
        backbone({"token_ids": IDS[:, :3], "cache": cache, "positions": positions})
    with pytest.raises(ValueError, match="rise in each row"):
        backbone({"token_ids": IDS[:, :3], "positions": positions[:, ::-1]})


def test_no_mask_of_ones_own(backbone: flm.Backbone) -> None:
    mask = np.ones((2, LENGTH, LENGTH), bool)
    with pytest.raises(ValueError, match="Expected no mask: layers of the type 'conv' keep"):
        backbone({"token_ids": IDS, "mask": mask})


def test_a_cache_of_another_model(backbone: flm.Backbone) -> None:
    for other, message in [
        (
            _build(["conv", "full_attention"]),
            "for conv/decoder_2/convolution/inputs the",
        ),
        (_build(["conv", "conv", "full_attention"]), "for conv/decoder_1/convolution/inputs"),
        (_build(["full_attention"]), r"with the keys \['full_attention'\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            backbone({"token_ids": IDS, "cache": make_cache(other, 2, 32)})
    cache = make_cache(backbone, 2, 32)
    cache["conv"] = keras.tree.map_structure(lambda x: np.repeat(x, 2, axis=1), cache["conv"])
    with pytest.raises(ValueError, match="for conv/.* the shape"):
        backbone({"token_ids": IDS, "cache": cache})


def test_a_cache_that_was_taken_apart(backbone: flm.Backbone) -> None:
    before = backbone({"token_ids": IDS[:, :5], "cache": make_cache(backbone, 2, 32)})["cache"]
    after = backbone({"token_ids": IDS[:, 5:7], "cache": before})["cache"]
    narrow = keras.tree.map_structure(lambda x: x.astype("bfloat16"), after["conv"])
    narrow["positions"] = after["conv"]["positions"]
    cases: list[tuple[Any, str]] = [
        (after["conv"], r"for each of .'conv', 'full_attention'. .* in part without positions"),
        ({**after, "conv": {"positions": after["conv"]["positions"]}}, "received another one's"),
        ({**after, "conv": narrow}, "states in float32 .* 'conv', .* received .'bfloat16'"),
        (
            {**after, "conv": before["conv"]},
            "'conv' after 5 tokens beside 'full_attention'",
        ),
        ({**before, "conv": after["conv"]}, "keep the whole cache of a call"),
        (keras.tree.map_structure(lambda x: x[:1], after), "a cache for 2 rows"),
        ([after], "with the keys list"),
    ]
    for cache, message in cases:
        with pytest.raises(ValueError, match=message):
            backbone({"token_ids": IDS[:, 7:8], "cache": cache})


def test_the_stock_file(backbone: flm.Backbone, expected: np.ndarray, tmp_path: Path) -> None:
    """Rows get their tokens in unlike portions, padding before a row's first and behind all."""
    backbone.save(tmp_path / "model.keras")
    model = keras.saving.load_model(tmp_path / "model.keras")
    _near(model(IDS), expected)
    decoder = model.get_layer("decoder")
    empty = {"cache": (2, 2 * LENGTH), "state": (2, 1)}
    kept = {
        name: keras.tree.map_structure(
            lambda x, begin=begin: np.zeros((*begin, *x.shape[2:]), "float32"), decoder.input[name]
        )
        for name, begin in empty.items()
    }
    filled = np.zeros(2, int)
    for left, counts in [((0, 2), (5, 3)), ((0, 0), (1, 6)), ((0, 0), (0, 1)), ((0, 0), (18, 14))]:
        length = max(np.add(left, counts))
        new = np.zeros((2, length), "int32")
        for row in range(2):
            own = IDS[row, filled[row] : filled[row] + counts[row]]
            new[row, left[row] : left[row] + counts[row]] = own
        begins = (filled - left).astype("int32")
        lengths = {"cache_length": begins, "new_length": np.add(left, counts).astype("int32")}
        result = decoder.predict_on_batch({"token_ids": new, **lengths, **kept})
        at = begins[:, None] + np.arange(length)
        for slots, update in zip(
            keras.tree.flatten(kept["cache"]),
            keras.tree.flatten(result["cache_update"]),
            strict=True,
        ):
            slots[np.arange(2)[:, None], at] = update
        kept["state"] = result["state"]
        for row in range(2):
            here = slice(left[row], left[row] + counts[row])
            right = expected[row, filled[row] : filled[row] + counts[row]]
            _near(result["logits"][row, here], right)
        filled += counts
    assert (filled == LENGTH).all()


def _read(folder: Path, name: str = "lfm2_old_keys", **changes: Any) -> Any:
    config = {**CONFIGS[name], **changes}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return flm.Backbone.from_preset(folder, load_weights=False).config


def test_biases_equal_those_of_transformers(tmp_path: Path) -> None:
    from reference import reference_logits, save_reference

    reference = save_reference({**CONFIGS["lfm2_untied"], "conv_bias": True}, tmp_path)
    backbone = flm.Backbone.from_preset(tmp_path)
    assert backbone.config.convolution_bias
    np.testing.assert_allclose(backbone(IDS), reference_logits(reference, IDS), atol=1e-4, rtol=0)


def test_lists_of_layers_that_do_not_fit(tmp_path: Path) -> None:
    assert _read(tmp_path / "0").layer_types == ("conv", "full_attention")
    assert _read(tmp_path / "1").intermediate_dim == 80  # int(2 / 3 * 100), in sixteens
    cases: list[tuple[dict[str, Any], str]] = [
        ({"full_attn_idxs": [1, 2]}, "full_attn_idxs from 0 to 1, for there are 2 layers"),
        ({"layer_types": ["full_attention"] * 2}, "layer_types and full_attn_idxs to say the"),
        ({"full_attn_idxs": None, "layer_types": ["conv"]}, "layer_types of 2 words"),
        ({"full_attn_idxs": None, "layer_types": ["conv", "mamba"]}, "unknown ones"),
        ({"conv_L_cache": 0}, "a positive integer for conv_L_cache"),
    ]
    for i, (changes, message) in enumerate(cases):
        with pytest.raises(ValueError, match=message):
            _read(tmp_path / f"bad_{i}", **changes)


LFM2_MOE, LFM3 = "lfm2_moe_scaled_after_dense", "lfm3_two_kinds_of_attention"


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (LFM2_MOE, {"layer_types": ["conv"]}, "layer_types of 2 words"),
        (LFM2_MOE, {"layer_types": None}, "lacks the keys .'layer_types'"),  # as in Transformers
        (LFM2_MOE, {"layer_types": ["conv", "sliding_attention"]}, "unknown ones: .'sliding_atte"),
        (LFM2_MOE, {"num_experts_per_tok": 7}, "from 1 to num_experts. Received: 7 and 6"),
        (LFM2_MOE, {"hidden_act": "gelu"}, "hidden_act='gelu' .expected 'silu'"),
        (LFM3, {"num_hidden_layers": 4}, "layer_types of 4 words .* received 3"),
        (LFM3, {"layer_types": ["conv", "mamba", "conv"]}, "unknown ones: .'mamba'"),
        (LFM3, {"sliding_window": None}, "a sliding_window that is in use"),
        (LFM3, {"rope_theta": 5.0}, "two things about RoPE"),
        (LFM3, {"rope_parameters": {"full_attention": {"rope_type": "yarn"}}}, "rope_type='yarn'"),
        (
            LFM3,
            {"rope_parameters": {"full_attention": {"partial_rotary_factor": 1.5}}},
            "a partial_rotary_factor of at most 1, received 1.5",
        ),
    ],
)
def test_kin_that_do_not_fit(
    tmp_path: Path, name: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        _read(tmp_path / "bad", name, **changes)


def test_the_first_name_of_proportional_rope(tmp_path: Path) -> None:
    """NVIDIA's NeMo AutoModel reads it so, too; Transformers 5.23 would turn all channels."""
    full = {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.4}
    first = _read(tmp_path / "first", LFM3, rope_parameters={"full_attention": full})
    now = {"full_attention": {**full, "rope_type": "proportional"}}
    assert first == _read(tmp_path / "now", LFM3, rope_parameters=now)
    assert first.rope_scaling.partial_rotary_factor == 0.4
