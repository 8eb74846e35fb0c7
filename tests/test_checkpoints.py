"""Checkpoints as others write them, made by program: what Transformers reads exactly, we do."""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import transformers

import functional_llm as flm
from configs import CONFIGS, ONE_OF_EACH_FAMILY
from functional_llm.backbones.families import FAMILIES
from functional_llm.formats.hf_config import read_config
from functional_llm.formats.hf_directory import HuggingFaceDirectory
from nightly import is_its_turn, one_of_each_kind
from pair import compiled
from reference import reference_logits, save_reference

IDS = np.array([[1, 5, 9, 100, 3, 7, 0, 2, 127, 64, 64, 11, 8, 9, 1, 3]])
Tensors = dict[str, np.ndarray]
Config = dict[str, Any]


@pytest.fixture(scope="module", params=ONE_OF_EACH_FAMILY)
def one(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A checkpoint, its parts, and one model that every variant of the weights is loaded into."""
    folder = tmp_path_factory.mktemp(request.param)
    reference = save_reference(CONFIGS[request.param], folder)
    backbone = flm.Backbone.from_preset(folder)
    return SimpleNamespace(
        config=json.loads((folder / "config.json").read_text()),
        tensors=safetensors.numpy.load_file(folder / "model.safetensors"),
        family=FAMILIES[CONFIGS[request.param]["model_type"]],
        backbone=backbone,
        program=compiled(backbone),
        logits=reference_logits(reference, IDS),
    )


def write(folder: Path, config: Config, tensors: Tensors) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    arrays = {name: np.asarray(x, order="C") for name, x in tensors.items()}
    safetensors.numpy.save_file(arrays, folder / "model.safetensors", {"format": "pt"})
    return folder


def theirs(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", dtype="float32"
    ).eval()


def check_weights(one: Any, folder: Path) -> None:
    """Loads the weights of a folder into the model and compares logits with Transformers'."""
    expected = reference_logits(theirs(folder), IDS)
    for variable in one.backbone.variables:
        variable.assign(np.full(variable.shape, np.nan, "float32"))
    source = HuggingFaceDirectory(folder, FAMILIES)
    assert source.config == one.backbone.config
    source.load(one.backbone)
    np.testing.assert_allclose(one.program(IDS), expected, atol=1e-4, rtol=0)


def _base_prefix(one: Any) -> str:
    """Returns what names begin with that bare models lack, as files have it."""
    stored = {ours: theirs for theirs, ours in one.family.stored_prefixes.items()}
    return stored.get(one.family.base_prefix, one.family.base_prefix)


def _bare(one: Any) -> Tensors:
    return {x.removeprefix(_base_prefix(one)): t for x, t in one.tensors.items()}


def _half_bare(one: Any) -> Tensors:
    # All experts of a layer alike: Transformers stacks them in the order of their whole names.
    groups = sorted({_without_numbers(x) for x in one.tensors})
    return {
        x
        if groups.index(_without_numbers(x)) % 2
        else x.removeprefix(_base_prefix(one)): one.tensors[x]
        for x in sorted(one.tensors)
    }


def _without_numbers(name: str) -> str:
    return re.sub(r"(?<=experts)\.\d+(?=\.)", "", name)


def _prefix_on_all(one: Any) -> Tensors:
    renamed = tuple(one.family.stored_prefixes)  # which Transformers knows without a prefix only
    prefix = _base_prefix(one)
    return {x if x.startswith(renamed) else prefix + x: t for x, t in one.tensors.items()}


def _mixed(one: Any) -> Tensors:
    kinds = ["float64", "float32", "float16"]
    return {x: t.astype(kinds[i % 3]) for i, (x, t) in enumerate(one.tensors.items())}


def _buffers(one: Any) -> Tensors:
    """Buffers of old versions of Transformers, each of which every version skips or warns of."""
    inv_freq, prefix = np.ones(4, "float32"), one.family.base_prefix
    if one.family.model_type == "opt":
        return {f"{prefix}decoder.version": np.ones(1, "float32")}
    if one.family.model_type in ("gpt2", "gptj"):
        causal = np.tril(np.ones((1, 1, 8, 8), "float32"))
        return {
            f"{prefix}h.0.attn.bias": causal,
            "h.1.attn.bias": causal,
            f"{prefix}h.0.attn.masked_bias": np.array(-1e4, "float32"),
        }
    if not hasattr(one.backbone.config, "rope_scaling"):
        return {}
    return {
        "model.layers.0.self_attn.rotary_emb.inv_freq": inv_freq,
        "layers.1.self_attn.rotary_emb.inv_freq": inv_freq,
        "model.rotary_emb.inv_freq": inv_freq,
        "rotary_emb.inv_freq": inv_freq,
    }


def _embedding(one: Any) -> str:
    return next(x for x in one.tensors if x.endswith(("embed_tokens.weight", "wte.weight")))


TENSORS: dict[str, Callable[[Any], Tensors]] = {
    "bare": _bare,
    "half bare": _half_bare,
    "prefix on all": _prefix_on_all,
    "float64": lambda one: {x: t.astype("float64") for x, t in one.tensors.items()},
    "float16": lambda one: {x: t.astype("float16") for x, t in one.tensors.items()},
    "mixed": _mixed,
    "buffers": lambda one: one.tensors | _buffers(one),
    "bare buffers": lambda one: _bare(one) | _buffers(one),
}


def _has_its_turn(parameters: Mapping[str, Any]) -> bool:
    """Each family takes one of the variants."""
    place = list(TENSORS).index(parameters["variant"])
    return is_its_turn(ONE_OF_EACH_FAMILY.index(parameters["one"]), place, len(TENSORS))


@pytest.mark.nightly(unless=_has_its_turn)
@pytest.mark.parametrize("variant", TENSORS)
def test_tensors(one: Any, variant: str, tmp_path: Path) -> None:
    if one.config["model_type"] == "llama4_text" and ("bare" in variant or "prefix" in variant):
        return  # Transformers takes no other names than its own there
    check_weights(one, write(tmp_path / "x", one.config, TENSORS[variant](one)))


def test_shards_and_a_folder_with_both(one: Any, tmp_path: Path) -> None:
    write(tmp_path, one.config, {})
    (tmp_path / "model.safetensors").unlink()
    names = sorted(one.tensors)
    files = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, held in files.items():
        safetensors.numpy.save_file(
            {x: one.tensors[x] for x in held}, tmp_path / file, {"format": "pt"}
        )
    placed = {x: file for file, held in files.items() for x in held}
    placed |= {"lm_head.inv_freq": "a.safetensors", names[0]: "b.safetensors"}
    index = {"metadata": {}, "weight_map": placed}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    check_weights(one, tmp_path)
    write(tmp_path, one.config, one.tensors)  # both: the one file counts
    check_weights(one, tmp_path)


@pytest.mark.parametrize("one", ["llama_multi_head_tied", "gpt2_tied"], indirect=True)
def test_a_tied_head_under_either_name(one: Any, tmp_path: Path) -> None:
    name = _embedding(one)
    alone = {x: t for x, t in one.tensors.items() if x not in (name, "lm_head.weight")}
    table = one.tensors[name]
    prefix = one.family.base_prefix
    for i, held in enumerate(
        [
            {name: table},
            {"lm_head.weight": table},
            {name: table, "lm_head.weight": table},
            {f"{prefix}lm_head.weight": table},
            {name.removeprefix(prefix): table},
        ]
    ):
        check_weights(one, write(tmp_path / str(i), one.config, alone | held))
    folder = write(tmp_path / "none", one.config, alone)
    with pytest.raises(ValueError, match=f"missing tensor '{name}'"):
        flm.Backbone.from_preset(folder)


_FIRST_NORMS = (
    *("layernorm.weight", "ln_1.weight", "ln_attn.weight", "self_attn_layer_norm.weight"),
    *("operator_norm.weight", ".0.norm.weight", "pre_norm.weight"),
)


@one_of_each_kind
def test_messages_name_what_is_in_the_file(one: Any, tmp_path: Path) -> None:
    norm = next(x for x in one.tensors if x.endswith(_FIRST_NORMS))
    bare = norm.removeprefix(_base_prefix(one))
    tensors = _bare(one) | {"extra": np.ones(3, "float32"), bare: np.ones(3, "float32")}
    with pytest.raises(ValueError, match=rf"(?s)tensor '{bare}': expected.*tensor 'extra' of"):
        flm.Backbone.from_preset(write(tmp_path, one.config, tensors))
    twice = one.tensors | {bare: one.tensors[norm]}
    with pytest.raises(ValueError, match=f"Received two: '.*{bare}' and '.*{bare}'"):
        flm.Backbone.from_preset(write(tmp_path, one.config, twice))


@pytest.mark.parametrize("one", ["llama_multi_head_tied"], indirect=True)
def test_pickles_are_not_opened(one: Any, tmp_path: Path) -> None:
    folder = write(tmp_path, one.config, {})
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(FileNotFoundError, match=r"pytorch_model\.bin.*save_pretrained\(folder"):
        flm.Backbone.from_preset(folder)


# Configs ------------------------------------------------------------------------------------


def their_config(config: Config) -> Any:
    text = json.dumps(config)
    keys = json.loads(text, object_hook=lambda x: float(x["__float__"]) if "__float__" in x else x)
    return transformers.AutoConfig.for_model(**keys)


def same_model(one: Any, config: Config) -> bool:
    """Whether Transformers makes the same of a config, as far as numbers of inference go."""
    names = {*one.config, "rope_parameters"} - {"transformers_version", "dtype", "architectures"}
    a, b = their_config(config), their_config(one.config)
    return all(_attribute(a, x) == _attribute(b, x) for x in names)


def _attribute(config: Any, name: str) -> Any:
    """Returns a number of Transformers' config: that of most layers, where it differs with them."""
    if name in ("head_dim", "num_key_value_heads", "per_layer_config"):
        return config.to_dict().get(name)
    return getattr(config, name, None)


def test_absent_and_null_keys_mean_what_they_mean_to_transformers(one: Any) -> None:
    """Without a key, or with null for it, the models are equal, unlike, or there is none."""
    base = read_config(one.config, one.family)
    loaded = 0
    for key in one.config:
        if key in ("model_type", "transformers_version"):
            continue
        for config in (
            {k: x for k, x in one.config.items() if k != key},
            {**one.config, key: None},
        ):
            try:
                same = same_model(one, config)
            except Exception:
                continue  # Transformers refuses it
            try:
                ours = read_config(config, one.family)
            except ValueError as error:
                assert "config.json" in str(error)
                continue
            loaded += 1
            if same:
                assert ours == base, key
            else:
                _check_fields(one, config, ours, key)
    assert loaded > 10


# What Transformers' layers make of these numbers is in our fields.
WORKED_OUT = {
    "lfm2": ["intermediate_size"],
    "deepseek_v2": ["n_group", "topk_group"],
    "gemma4_text": ["global_head_dim", "num_global_key_value_heads"],
    "kimi_linear": ["first_k_dense_replace"],
}


def _check_fields(one: Any, config: Config, ours: Any, key: str) -> None:
    """Compares fields with the attributes of Transformers' config."""
    expected = their_config(config)
    for name, field in one.family.config_keys.items():
        if not isinstance(field, str) or field in ("activation", "max_sequence_length"):
            continue
        if name in WORKED_OUT.get(one.config["model_type"], []):
            continue
        attribute = {"n_inner": "n_inner"}.get(name, name)
        value = _attribute(expected, attribute)
        if value is None and field in ("head_dim", "intermediate_dim"):
            continue
        if field == "partial_rotary_factor":
            value = expected.rope_parameters[field]
        if field == "local_rope_max_wavelength":
            value = expected.rope_parameters["sliding_attention"]["rope_theta"]
        received = getattr(ours, field)
        received = list(received) if isinstance(received, tuple) else received
        value = bool(value) if isinstance(received, bool) else value  # null is false
        assert received == value, (key, name)


ALIASES = {
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_positions": "max_position_embeddings",
}


@pytest.mark.parametrize("one", ["gpt2_tied"], indirect=True)
def test_other_names_of_keys(one: Any) -> None:
    renamed = {ALIASES.get(key, key): x for key, x in one.config.items()}
    assert same_model(one, renamed)
    base = read_config(one.config, one.family)
    assert read_config(renamed, one.family) == base
    assert read_config(one.config | renamed, one.family) == base
    with pytest.raises(ValueError, match="one value of n_embd and hidden_size, received 48 and 96"):
        read_config({**one.config, "hidden_size": 96}, one.family)


def test_keys_of_generating_and_of_old_versions_are_left_alone(one: Any) -> None:
    defaults = transformers.GenerationConfig._get_default_generation_params()
    extra = {
        "torch_dtype": "bfloat16",
        "dtype": "float16",
        "is_encoder_decoder": False,
        "pruned_heads": {},
        "architectures": ["LlamaModel"],
        "num_labels": 2,
    }
    config = {**one.config, **defaults, **extra}
    assert read_config(config, one.family) == read_config(one.config, one.family)


def test_activations_under_both_keys() -> None:
    for name, both in {
        "gemma_grouped": [
            ("gelu", None),
            ("gelu", "gelu_pytorch_tanh"),
            ("gelu", "gelu"),
            ("gelu_pytorch_tanh", None),
            (None, None),
            ("silu", "silu"),
            ("gelu_pytorch_tanh", "relu"),
            (None, "silu"),
        ],
        "gemma2_soft_caps": [
            (None, "gelu"),
            ("gelu_pytorch_tanh", "gelu_pytorch_tanh"),
            (None, "silu"),
            ("silu", None),
            ("silu", "silu"),
            (None, None),
            ("relu", "gelu"),
        ],
    }.items():
        family = FAMILIES[CONFIGS[name]["model_type"]]
        for act, activation in both:
            given = {"hidden_act": act, "hidden_activation": activation}
            config = CONFIGS[name] | {key: x for key, x in given.items() if x is not None}
            mlp = transformers.AutoModelForCausalLM.from_config(their_config(config))
            act_fn = type(mlp.model.layers[0].mlp.act_fn).__name__
            expected = {
                "GELUActivation": "gelu",
                "GELUTanh": "gelu_approximate",
                "SiLUActivation": "silu",
                "SiLU": "silu",
                "ReLU": "relu",
            }[act_fn]
            try:
                assert read_config(config, family).activation == expected, (act, activation)
            except ValueError as error:
                assert "to say the same" in str(error)
                assert act != activation
