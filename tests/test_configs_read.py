"""RoPE in a config.json against Transformers, and what anybody may write into one."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import functional_llm as flm
from configs import CONFIGS, ONE_OF_EACH_FAMILY
from functional_llm.backbones.families import FAMILIES
from functional_llm.blocks import mlp
from functional_llm.blocks.rope import Rope
from functional_llm.formats.hf_config import ACTIVATIONS, read_config, write_config
from functional_llm.formats.hf_directory import HuggingFaceDirectory
from functional_llm.presets.sources import read_numbers
from nightly import is_night
from reference import reference_greedy, save_reference

LLAMA = FAMILIES["llama"]
BASE = {key: x for key, x in CONFIGS["llama_grouped"].items() if key != "rope_parameters"}
GEMMA3 = {key: x for key, x in CONFIGS["gemma3_two_ropes"].items() if key != "rope_parameters"}


def rope_of(config: dict[str, Any]) -> tuple[np.ndarray, float]:
    """Returns our frequencies and magnitude for a config."""
    ours: Any = read_config(config, FAMILIES[config["model_type"]])
    rope = Rope(ours.head_dim, ours.rope_max_wavelength, ours.rope_scaling)
    return rope.frequencies, rope.magnitude


def their_rope(config: dict[str, Any], kind: str | None = None) -> tuple[np.ndarray, float]:
    """Returns Transformers' frequencies and magnitude for a config."""
    model = transformers.AutoConfig.for_model(**json.loads(json.dumps(config)))
    parameters = model.rope_parameters if kind is None else model.rope_parameters[kind]
    if parameters["rope_type"] == "default":
        size = model.head_dim
        exponents = np.arange(0, size, 2).astype("float32") / size
        return 1 / parameters["rope_theta"] ** exponents, 1.0
    arguments = {} if kind is None else {"layer_type": kind}
    frequencies, magnitude = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](model, **arguments)
    return frequencies.numpy(), magnitude


def assert_same(config: dict[str, Any], kind: str | None = None) -> None:
    ours, theirs = rope_of(config), their_rope(config, kind)
    np.testing.assert_allclose(ours[0], theirs[0], rtol=2e-6)
    np.testing.assert_allclose(ours[1], theirs[1], rtol=1e-9)


numbers = st.floats(1.0, 64.0).map(lambda x: round(x, 3))
lengths = st.integers(16, 8192)


def some_of(fields: dict[str, Any]) -> Any:
    return st.fixed_dictionaries({}, optional=fields)


YARN = some_of(
    {
        "original_max_position_embeddings": lengths,
        "attention_factor": st.floats(0.1, 3),
        "beta_fast": st.one_of(st.none(), st.integers(0, 64), numbers),
        "beta_slow": st.one_of(st.none(), st.floats(0.1, 8)),
        "mscale": st.one_of(st.none(), st.floats(0.1, 2)),
        "mscale_all_dim": st.one_of(st.none(), st.floats(0.1, 2)),
        "truncate": st.booleans(),
    }
)
LLAMA3 = st.fixed_dictionaries(
    {"low_freq_factor": st.floats(0.5, 8), "high_freq_factor": st.floats(0.5, 8)},
    optional={"original_max_position_embeddings": lengths},
)
KINDS = {"linear": st.just({}), "yarn": YARN, "llama3": LLAMA3}
fast = settings(
    max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
)


@pytest.mark.parametrize("kind", KINDS)
def test_any_numbers_give_transformers_frequencies(kind: str) -> None:
    @fast
    @given(
        KINDS[kind],
        numbers,
        st.floats(100, 1e7),
        st.sampled_from(["type", "rope_type", "new"]),
        st.sampled_from([8, 12, 64]),
    )
    def check(extra: dict[str, Any], factor: float, theta: float, spelling: str, size: int) -> None:
        config: dict[str, Any] = {**BASE, "head_dim": size}
        key = "type" if spelling == "type" else "rope_type"
        scaling = {key: kind, "factor": factor, **extra}
        if spelling == "new":
            config["rope_parameters"] = {**scaling, "rope_theta": theta}
        else:
            config |= {"rope_theta": theta, "rope_scaling": scaling}
        assert_same(config)

    check()


def test_a_null_factor_is_the_ratio_of_the_lengths() -> None:
    yarn = {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 128}
    assert_same({**BASE, "rope_scaling": yarn})


YARN4 = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
DEFAULT = {"rope_type": "default", "rope_theta": 10000.0}


@pytest.mark.parametrize(
    "keys",
    [
        {"rope_parameters": DEFAULT, "rope_scaling": YARN4},
        {"rope_parameters": DEFAULT, "rope_scaling": YARN4, "rope_theta": 10000.0},
        {"rope_parameters": {**YARN4, "rope_theta": 500.0}, "rope_theta": 500.0},
        {"rope_parameters": {**YARN4, "rope_theta": 1e4}, "rope_scaling": YARN4},
        {"rope_parameters": YARN4},
        {"rope_parameters": {"rope_theta": 500.0}},
        {"rope_parameters": {}, "rope_theta": 500.0, "rope_scaling": None},
        {"rope_parameters": None, "rope_scaling": {}},
        {},
        {"rope_scaling": {**YARN4, "rope_theta": 300.0}},
        {"rope_scaling": {**YARN4, "partial_rotary_factor": 1.0}, "partial_rotary_factor": 1.0},
    ],
)
def test_spellings_that_agree(keys: dict[str, Any]) -> None:
    assert_same({**BASE, **keys})


@pytest.mark.parametrize(
    ("keys", "values"),
    [
        ({"rope_parameters": {"rope_theta": 500.0}, "rope_theta": 300.0}, ("300.0", "500.0")),
        (
            {"rope_parameters": {"rope_theta": 500.0}, "rope_scaling": YARN4},
            ("500.0", "no rope_th"),
        ),
        ({"rope_parameters": {**YARN4, "factor": 2.0}, "rope_scaling": YARN4}, ("2.0", "4.0")),
        (
            {"rope_parameters": YARN4, "rope_scaling": {"type": "linear", "factor": 4.0}},
            ("'yarn'", "'linear'"),
        ),
        (
            {"rope_parameters": {**YARN4, "beta_fast": 16}, "rope_scaling": YARN4},
            ("16", "no beta_fast"),
        ),
        ({"rope_scaling": {"type": "linear", "rope_type": "yarn"}}, ("'linear'", "'yarn'")),
    ],
)
def test_spellings_that_disagree_show_both_values(
    keys: dict[str, Any], values: tuple[str, ...]
) -> None:
    with pytest.raises(ValueError, match=r"config\.json") as raised:
        read_config({**BASE, **keys}, LLAMA)
    assert all(value in str(raised.value) for value in values)


LINEAR8 = {"rope_type": "linear", "factor": 8.0}


@pytest.mark.parametrize(
    "keys",
    [
        {"rope_scaling": LINEAR8, "rope_theta": 5e5, "rope_local_base_freq": 500.0},
        {"rope_scaling": LINEAR8},
        {"rope_parameters": {"full_attention": {**LINEAR8, "rope_theta": 300.0}}},
        {"rope_parameters": {"sliding_attention": {"rope_theta": 300.0}}, "rope_theta": 7e4},
        {"rope_parameters": {"full_attention": None, "sliding_attention": None}},
        {
            "rope_parameters": {"full_attention": {"rope_theta": 300.0}, "sliding_attention": {}},
            "rope_scaling": YARN4,
        },
        {},
    ],
)
def test_two_kinds_of_rope(keys: dict[str, Any]) -> None:
    config = {**GEMMA3, **keys}
    assert_same(config, "full_attention")
    ours: Any = read_config(config, FAMILIES["gemma3_text"])
    expected = transformers.AutoConfig.for_model(**json.loads(json.dumps(config)))
    local = expected.rope_parameters["sliding_attention"]["rope_theta"]
    assert ours.local_rope_max_wavelength == local


def test_flat_parameters_of_two_kinds_of_rope_name_no_default() -> None:
    keys = {"rope_parameters": {"rope_type": "default", "rope_theta": 300.0}}
    with pytest.raises(ValueError, match=r"=300\.0 in rope_parameters, and no rope_theta where"):
        read_config({**GEMMA3, **keys}, FAMILIES["gemma3_text"])
    with pytest.raises(ValueError, match=r"=300\.0 in rope_parameters, and 5000\.0 as rope_theta"):
        read_config({**GEMMA3, **keys, "rope_theta": 5e3}, FAMILIES["gemma3_text"])


@pytest.mark.parametrize(
    "keys",
    [
        {"rope_parameters": {"rope_type": "default", "rope_theta": 300.0}},  # not read by it
        {"rope_scaling": {"type": "linear", "factor": 8.0}},  # nor is this type
        {"rope_scaling": {**YARN4, "truncate": False}},  # nor this
        {"rope_parameters": {"sliding_attention": LINEAR8}},
        {"rope_parameters": {"sliding_attention": {"rope_theta": 3.0}}, "rope_local_base_freq": 5},
    ],
)
def test_two_kinds_of_rope_that_are_refused(keys: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"config\.json"):
        read_config({**GEMMA3, **keys}, FAMILIES["gemma3_text"])


@pytest.mark.parametrize(
    ("scaling", "context"),
    [
        ({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}, 512),
        ({"type": "yarn", "factor": 4.0}, 512),
        ({"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32}, 128),
        ({"type": "linear", "factor": 4.0}, 512),
        (
            {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
            1024,
        ),
        # The length is that of the stretched model already, as in Llama 3.2.
        (
            {
                "rope_type": "llama3",
                "factor": 32.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8,
            },
            128,
        ),
    ],
)
def test_context_is_what_the_scaling_allows(scaling: dict[str, Any], context: int) -> None:
    config = {**BASE, "max_position_embeddings": 128, "rope_scaling": scaling}
    ours = read_config(config, LLAMA)
    assert ours.max_sequence_length == context
    assert read_config(write_config(ours, LLAMA, "float32"), LLAMA) == ours


def test_a_prompt_beyond_the_original_length(tmp_path: Path) -> None:
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
    config = {
        **BASE,
        "max_position_embeddings": 128,
        "rope_parameters": {**scaling, "rope_theta": 10000.0},
    }
    model = save_reference(config, tmp_path)
    prompt = np.random.default_rng(0).integers(0, 128, 300).tolist()
    generator = flm.TextGenerator(flm.Backbone.from_preset(tmp_path))
    received = generator.generate_ids([prompt], max_new_tokens=4)
    assert received == [reference_greedy(model, prompt, 4)]


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        ({"type": "dynamic", "factor": 2.0}, "depend on how long a text is"),
        ({"type": "yarn"}, "lack factor"),
        ({"type": "llama3", "factor": 2.0}, "lack low_freq_factor, high_freq_factor"),
        (
            {"type": "longrope", "short_factor": [1] * 6, "attention_factor": 2.0},
            "lack long_factor",
        ),
        ({"type": "yarn", "factor": "4"}, "above 0 for factor, received '4'"),
        (
            {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 0},
            "positive integer",
        ),
        ({"type": "yarn", "factor": 4.0, "finetuned": True}, "unknown RoPE parameters"),
        ({"type": "llama3", "factor": 2.0, "low_freq_factor": None}, "lack low_freq_factor"),
        ({"type": "su", "factor": 4.0}, "unknown rope_type='su'"),
        ({"type": "linear", "factor": 4.0, "partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ],
)
def test_messages_name_keys_and_no_classes(scaling: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        read_config({**BASE, "rope_scaling": scaling}, LLAMA)
    assert "__init__" not in str(raised.value)
    assert "Scaling(" not in str(raised.value)


# Nonsense -----------------------------------------------------------------------------------

words = st.sampled_from(
    ["", "silu", "48", "full_attention", "yarn", "default", "rope_type", "factor", "x" * 99]
)
leaves = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 9),
    st.just(10**30),
    st.just(-(10**400)),
    st.floats(),
    st.sampled_from([0.0, 1e300, 1e-300, 3.5]),
    words,
)
nonsense = st.recursive(
    leaves,
    lambda x: st.one_of(st.lists(x, max_size=3), st.dictionaries(words, x, max_size=3)),
    max_leaves=6,
)


@pytest.mark.parametrize(
    "name", [*ONE_OF_EACH_FAMILY, "llama_yarn_mscale", "qwen2_some_layers_slide"]
)
def test_any_config_is_read_or_refused_in_one_message(
    name: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    good = {**CONFIGS[name], "hidden_act": "silu", "rope_scaling": None, "torch_dtype": "float32"}
    good |= {"layer_types": None, "sliding_window_pattern": 6, "head_dim": 12}
    family = FAMILIES[good["model_type"]]
    keys = sorted(
        {
            *good,
            *family.config_keys,
            *family.config_aliases,
            *family.config_ignored,
            *family.config_constants,
            "rope_theta",
            "rope_local_base_freq",
        }
    )

    @settings(
        max_examples=80 if is_night(request.config) else 30,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        derandomize=True,
    )
    @given(
        st.dictionaries(st.sampled_from(keys), nonsense, max_size=3),
        st.sets(st.sampled_from(keys), max_size=2),
    )
    def check(changes: dict[str, Any], taken: set[str]) -> None:
        config = {key: x for key, x in {**good, **changes}.items() if key not in taken}
        (tmp_path / "config.json").write_text(json.dumps(config))
        source = HuggingFaceDirectory(tmp_path, FAMILIES)
        try:
            family, ours = source.family, source.config
        except ValueError as error:
            assert str(error)
            assert len(str(error)) < 3000
            return
        if ours.num_layers < 20 and ours.max_sequence_length < 10**6:
            try:
                family.build(ours)
            except ValueError as error:
                assert str(error)

    check()


@pytest.mark.parametrize(
    "text", ["", "[]", "null", "{", '{"model_type": ', "[" * 100_000, '"x"', "\xff", "{}", "7"]
)
def test_any_text_in_the_file(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"config\.json"):
        read_numbers(tmp_path)


def test_activations_are_all_that_transformers_has() -> None:
    x = np.concatenate([np.linspace(-12, 12, 97), [-1e-3, 0.0, 1e-3]]).astype("float32")
    assert set(transformers.activations.ACT2FN) - set(ACTIVATIONS) == {"prelu", "xielu"}
    for theirs, ours in ACTIVATIONS.items():
        expected = transformers.activations.ACT2FN[theirs](torch.from_numpy(x)).numpy()
        received = mlp.ACTIVATIONS[ours](jnp.asarray(x))
        np.testing.assert_allclose(received, expected, atol=1e-5, rtol=1e-5, err_msg=theirs)
    assert set(ACTIVATIONS.values()) == set(mlp.ACTIVATIONS)


@pytest.mark.parametrize("name", ONE_OF_EACH_FAMILY)
def test_activations_are_written_so_that_they_are_read_again(name: str) -> None:
    family = FAMILIES[CONFIGS[name]["model_type"]]
    config: Any = read_config(CONFIGS[name], family)
    has_choice = "activation" in family.config_keys.values()
    for activation in mlp.ACTIVATIONS if has_choice else ():
        ours = dataclasses.replace(config, activation=activation)
        assert read_config(write_config(ours, family, "float32"), family) == ours


@pytest.mark.parametrize(
    ("name", "keys", "received"),
    [
        ("gemma_grouped", {"hidden_activation": "relu"}, "no hidden_act, which means 'gelu_pyt"),
        (
            "gemma_grouped",
            {"hidden_activation": "relu", "hidden_act": "gelu"},
            "hidden_act='gelu', which means 'gelu_pyt",
        ),
        ("gemma2_soft_caps", {"hidden_act": "silu"}, "='silu' and no hidden_activation, which"),
        ("gemma2_soft_caps", {"sliding_window_size": 4}, "_size=4 and sliding_window=8. Transf"),
    ],
)
def test_a_key_that_is_not_read_is_told_from_a_default(
    name: str, keys: dict[str, Any], received: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(received)):
        read_config({**CONFIGS[name], **keys}, FAMILIES[CONFIGS[name]["model_type"]])


@pytest.mark.parametrize(
    ("name", "keys", "message"),
    [
        (
            "hunyuan_alpha_norm_after_rope",
            {"rope_parameters": {"type": "linear", "factor": 2.0}},
            "unknown rope_type='linear'. Known: default, dynamic",
        ),
        (
            "hunyuan_alpha_norm_after_rope",
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}},
            "lack alpha",
        ),
        (
            "llama_grouped",
            {"rope_parameters": {"rope_type": "ntk_alpha", "alpha": 2.0}},
            "unknown rope_type='ntk_alpha'",
        ),
        (
            "llama_grouped",
            {"rope_parameters": {**YARN4, "llama_4_scaling_beta": 0.1}},
            "unknown RoPE parameters ['llama_4_scaling_beta']",
        ),
        (
            "ministral3_growing_queries",
            {"rope_parameters": DEFAULT},
            "unknown rope_type='default'. Known: yarn",
        ),
        (
            "olmo3_yarn_in_full_layers",
            {"rope_parameters": None, "rope_theta": 3000.0},
            "a rope_theta in rope_parameters for each of full_attention and sliding_attention",
        ),
        ("exaone4_nope_in_full_layers", {"sliding_window": None}, "a sliding_window that is in"),
        ("exaone4_nope_in_full_layers", {"sliding_window_pattern": "LX"}, "letters L and G"),
        ("smollm3_nope_slides", {"no_rope_layers": [1]}, "no_rope_layers of 2 numbers"),
        ("smollm3_nope_slides", {"no_rope_layer_interval": 0}, "a positive integer"),
    ],
)
def test_patterns_and_types_of_rope_that_a_family_does_not_have(
    name: str, keys: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        read_config({**CONFIGS[name], **keys}, FAMILIES[CONFIGS[name]["model_type"]])


def test_a_pattern_of_letters_ends_with_a_full_layer() -> None:
    config = {**CONFIGS["exaone4_pattern_llama3_multi_query"], "num_hidden_layers": 5}
    ours: Any = read_config({**config, "sliding_window_pattern": "LLG"}, FAMILIES["exaone4"])
    assert [kind[0] for kind in ours.layer_types] == ["s", "s", "f", "s", "f"]


def test_heads_that_do_not_share_out_evenly() -> None:
    with pytest.raises(ValueError, match="num_attention_heads to be a multiple of num_key_value_h"):
        read_config({**BASE, "num_key_value_heads": 3}, LLAMA)
    with pytest.raises(ValueError, match="n_embd to be a multiple of n_head, received 48 and 5"):
        read_config({**CONFIGS["gpt2_tied"], "n_head": 5}, FAMILIES["gpt2"])


def test_no_config_at_all(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        flm.Backbone.from_preset(tmp_path)


@pytest.mark.parametrize(
    ("name", "keys", "message"),
    [
        ("phi_half_of_each_head", {"tie_word_embeddings": True}, "tie_word_embeddings=True"),
        ("phi_half_of_each_head", {"partial_rotary_factor": 1.5}, "at most 1, received"),
        (
            "phi_query_key_norm_grouped",
            {"partial_rotary_factor": 0.5},
            "one partial_rotary_factor of at most 1, received .*0.4.*0.5",
        ),
        ("stablelm_quarter_of_each_head", {"head_dim": 8}, "num_attention_heads, 16, .* 8"),
        ("stablelm_quarter_of_each_head", {"rope_pct": 0.5}, "rope_pct and partial_rotary_factor"),
        ("gptj_half_of_each_head", {"rotary_dim": 13}, "rotary_dim of at most n_embd / n_head"),
        ("nemotron_half_of_each_head", {"num_key_value_heads": None}, "a value for num_key_value"),
        ("cohere2_full_layer_first", {"sliding_window": None}, "a value for sliding_window"),
        ("cohere2_full_layer_first", {"rotary_pct": 0.5}, "rotary_pct=0.5"),
        ("opt_norms_before", {"_remove_final_layer_norm": True}, "_remove_final_layer_norm=True"),
    ],
)
def test_what_no_part_does_is_refused(name: str, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_config({**CONFIGS[name], **keys}, FAMILIES[CONFIGS[name]["model_type"]])


def test_a_part_of_a_head_is_written_as_it_is_read() -> None:
    family = FAMILIES["phi"]
    for factor in (0.25, 0.4, 1 / 3, 1.0):
        raw = {**CONFIGS["phi_half_of_each_head"], "partial_rotary_factor": factor}
        config: Any = read_config(raw, family)
        assert config.rotary_dim == int(12 * factor)
        assert read_config(write_config(config, family, "float32"), family) == config


def test_the_context_of_a_cohere_is_the_one_that_llama_cpp_reads() -> None:
    config: Any = read_config(
        {**CONFIGS["cohere_pairs"], "model_max_length": 4096}, FAMILIES["cohere"]
    )
    assert config.max_sequence_length == 4096
