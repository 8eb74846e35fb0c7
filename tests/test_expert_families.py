"""What families with experts refuse, and how a GGUF file of arch `llama` says that it has none."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind

import functional_llm as flm
from configs import CONFIGS, ONE_OF_EACH_FAMILY
from functional_llm.backbones.families import FAMILIES
from functional_llm.formats.hf_config import read_config
from nightly import one_of_each_kind
from reference import make_reference, reference_logits, save_reference
from tiny import save_tiny
from tiny_gguf import save_gguf

_COUNT = "expected num_experts_per_tok from 1 to "


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("mixtral_two_of_five", {"num_experts_per_tok": 6}, _COUNT + "num_local_experts.*6 and 5"),
        ("olmoe_multi_head", {"num_experts_per_tok": 7}, _COUNT + "num_experts.*7 and 6"),
        ("qwen2_moe_some_dense", {"num_experts": 1}, _COUNT + "num_experts.*2 and 1"),
        ("qwen2_moe_some_dense", {"num_experts": None}, _COUNT + "num_experts.*2 and None"),
        ("qwen3_moe_some_dense", {"num_experts_per_tok": 9}, _COUNT + "num_experts.*9 and 6"),
        ("qwen3_moe_some_dense", {"decoder_sparse_step": 0}, "decoder_sparse_step of at least 1"),
        ("mixtral_two_of_five", {"num_experts": 4}, "num_local_experts and num_experts"),
        ("qwen2_moe_some_dense", {"layer_types": ["sliding_attention"] * 2}, "a sliding_window"),
        ("olmoe_multi_head", {"clip_qkv": -1.0}, "above 0 for clip_qkv"),
    ],
)
def test_numbers_that_make_no_model(name: str, changes: dict[str, Any], message: str) -> None:
    config = {**CONFIGS[name], **changes}
    with pytest.raises(ValueError, match=message):
        read_config(config, FAMILIES[config["model_type"]])


@pytest.mark.parametrize(
    ("keys", "change"),
    [
        ({"num_experts": 6}, lambda config: config),
        ({"sliding_window": 0}, lambda config: config),  # as Transformers writes that there is none
        ({"mlp_only_layers": None}, lambda config: config),
        ({}, lambda config: {x: config[x] for x in config if x != "norm_topk_prob"}),
    ],
)
def test_spellings_of_qwen2_moe(keys: dict[str, Any], change: Callable[[Any], Any]) -> None:
    config = {**CONFIGS["qwen2_moe_all_chosen_tied"], "num_experts": 6}
    family = FAMILIES["qwen2_moe"]
    assert read_config(change({**config, **keys}), family) == read_config(config, family)


COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
WITH_EXPERTS = [name for name in ONE_OF_EACH_FAMILY if set(COUNTS) & set(CONFIGS[name])]


def _built(config: dict[str, Any]) -> Any:
    family = FAMILIES[config["model_type"]]
    ours = read_config(config, family)
    return flm.Backbone(*family.build(ours), config=ours)


@one_of_each_kind
@pytest.mark.parametrize("name", WITH_EXPERTS)
def test_numbers_of_experts_that_do_not_fit(name: str, tmp_path: Path) -> None:
    two_layers = {} if "hybrid_override_pattern" in CONFIGS[name] else {"num_hidden_layers": 2}
    config: dict[str, Any] = {**CONFIGS[name], **two_layers}
    (key,) = set(COUNTS) & set(config)
    count = config[key]
    one_group: dict[str, Any] = {x: 1 for x in ("n_group", "topk_group") if x in config}
    chosen = "moe_k" if "moe_k" in config else "num_experts_per_tok"
    with pytest.raises(ValueError, match=f"{chosen}.*{count + 1}"):
        read_config({**config, chosen: count + 1}, FAMILIES[config["model_type"]])

    save_reference(config, tmp_path)
    path = tmp_path / "config.json"
    given = json.loads(path.read_text())
    (key_there,) = set(COUNTS) & set(given)
    for other, words in ((count + 1, "missing tensor"), (count - 1, "unknown tensor")):
        path.write_text(json.dumps({**given, key_there: other, **one_group}))
        with pytest.raises(ValueError, match="does not fit the config") as error:
            flm.Backbone.from_preset(tmp_path)
        expert = max(other - 1, count - 1)
        one_each = (
            rf"{words} '[^']*layers.(\d).[^']*experts.{expert}.[^\n]*expert {expert} of layer \1"
        )
        stacked = rf"layers.\d[^\n]*': expected shape \({other}, [^\n]*, received \({count}, "
        assert re.search(f"{one_each}|{stacked}", str(error.value)), error.value

    lora = flm.peft.lora(_built(config), 2, targets=["experts_down"])
    flm.peft.save_adapter(lora, tmp_path / "adapter")
    less = {**config, key: count - 1, **one_group}
    with pytest.raises(ValueError, match=f"expected A and B of {count - 1} experts of rank 2"):
        flm.peft.load_adapter(_built(less), tmp_path / "adapter")


def test_a_gguf_file_of_a_llama_may_say_that_it_has_no_experts(tmp_path: Path) -> None:
    tokenizer = save_tiny(tmp_path) / "tokenizer.json"
    model = make_reference({**CONFIGS["llama_grouped"], "vocab_size": 600})
    path = tmp_path / "model.gguf"
    save_gguf(model, tokenizer, path, Kind.F32, expert_count=0, expert_used_count=0)
    backbone = flm.Backbone.from_preset(path)
    ids = np.array([[1, 5, 9, 100]])
    expected = reference_logits(model, ids)
    np.testing.assert_allclose(np.asarray(backbone(ids)), expected, atol=1e-4, rtol=0)
