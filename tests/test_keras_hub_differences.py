"""Where KerasHub computes something else than Transformers, and what its classes take."""

import inspect
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import functional_llm as flm
from configs import CONFIGS
from functional_llm.backbones.families import FAMILIES
from functional_llm.backbones.keras_hub.column import REQUIRED
from functional_llm.formats.keras_hub_config import IRRELEVANT
from functional_llm.graph.keras_values import uninitialized
from hub_models import (
    IDS,
    MODELS,
    hub_logits,
    hub_text,
    keras_hub,
    make_hub,
)
from reference import attention_of, reference_logits, save_reference


def test_the_column_has_the_arguments_and_defaults_of_the_classes() -> None:
    for family in FAMILIES.values():
        for name in family.keras_hub.classes if family.keras_hub else ():
            signature = inspect.signature(getattr(keras_hub.models, name).__init__)
            theirs = {
                key: REQUIRED if x.default is x.empty else x.default
                for key, x in signature.parameters.items()
                if x.kind is x.POSITIONAL_OR_KEYWORD and key not in {"self", *IRRELEVANT}
            }
            assert family.keras_hub is not None
            ours = dict(family.keras_hub.arguments)
            if name in ("Gemma3Backbone", "Gemma4Backbone"):
                ours["image_size"] = REQUIRED  # of the class only: files may leave it out
            assert ours == theirs, name


def test_the_page_names_the_classes_of_every_family(repository: Path) -> None:
    text = (repository / "docs" / "keras_hub.md").read_text(encoding="utf-8")
    lines = re.findall(r"^\| ([\w, ]+) \| (`\w+Backbone`.*) \|$", text, re.M)
    named = {
        name: set(re.findall(r"`(\w+)`", line))
        for names, line in lines
        for name in names.split(", ")
    }
    columns = {x.model_type: x.keras_hub for x in FAMILIES.values() if x.keras_hub is not None}
    assert named == {name: set(column.classes) for name, column in columns.items()}
    writes = {row["family"] for row in flm.list_families() if "KerasHub" in row["writes"]}
    assert writes == columns.keys() - {"falcon"}


# Where KerasHub computes something else than Transformers.


def assert_ours_is_transformers(ours: Any, folder: Path, expected: np.ndarray) -> None:
    """Checks that our logits are those of Transformers, and that KerasHub's are not."""
    import transformers

    ours.save_preset(folder)
    config = transformers.AutoConfig.from_pretrained(folder)
    reference = transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation=attention_of(config)
    ).eval()
    logits = np.asarray(ours(IDS))
    np.testing.assert_allclose(logits, reference_logits(reference, IDS), atol=1e-4)
    assert np.abs(logits - expected).max() > 1e-3


WRONG: dict[str, tuple[str, dict[str, Any], str]] = {
    "gemma2_scales_scores_by_the_head_size": (
        "gemma2",
        {"query_head_dim_normalize": False},
        "scales scores by the head size 16 instead of 12",
    ),
    "gemma3_scales_scores_by_the_head_size": (
        "gemma3",
        {"query_head_dim_normalize": False},
        "scales scores by the head size 16 instead of 12",
    ),
    "gemma_norms_of_layers_keep_their_epsilon": (
        "gemma",
        {"layer_norm_epsilon": 0.1},
        "an epsilon of 1e-6",
    ),
    "llama_ignores_the_factor_on_positions": (
        "llama3",
        {
            "rope_frequency_adjustment_factor": None,
            "rope_low_freq_factor": None,
            "rope_high_freq_factor": None,
            "rope_pretraining_sequence_length": None,
            "rope_position_scaling_factor": 4.0,
        },
        "ignores rope_position_scaling_factor",
    ),
    "qwen_has_no_window_on_jax": (
        "qwen",
        {"use_sliding_window_attention": True, "sliding_window_size": 5},
        "no window",
    ),
    "qwen3_has_no_window_on_jax": ("qwen3", {"sliding_window_size": 5}, "no window"),
    "gpt_oss_has_its_windows_in_the_other_layers": (
        "gpt_oss",
        {"sliding_window": 5},
        "windows are in the layers that have none, and a token longer",
    ),
    "qwen3_moe_has_no_window_on_jax": ("qwen3_moe", {"sliding_window_size": 5}, "no window"),
    "qwen3_moe_norms_of_queries_keep_their_epsilon": (
        "qwen3_moe",
        {"layer_norm_epsilon": 0.1},
        "an epsilon of 1e-6",
    ),
    "falcon_does_not_round_alibi": ("falcon", {}, "does not round ALiBi to bfloat16"),
    "falcon_norms_of_layers_keep_their_epsilon": (
        "falcon",
        {"layer_norm_epsilon": 0.1, "num_attention_heads": 4},
        "an epsilon of 1e-5",
    ),
}


@pytest.mark.nightly
@pytest.mark.parametrize("name", WRONG)
def test_kerashub_differs_from_transformers(name: str, tmp_path: Path) -> None:
    model, changes, message = WRONG[name]
    hub = make_hub(model, **changes)
    with pytest.warns(UserWarning, match=message):
        ours = flm.from_keras_hub(hub)
    assert_ours_is_transformers(ours, tmp_path / "hf", hub_logits(hub))
    with pytest.raises(ValueError, match=message):
        flm.to_keras_hub(ours)


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("name", "room", "message"),
    [
        ("gpt_neox", 16, "every new token as the first"),
        ("phi3_long", 24, "a prompt as a long text"),
        ("qwen3_5", 24, "the prompt's last token twice"),
    ],
)
def test_kerashubs_generate_does_not_write_what_its_class_computes(
    name: str, room: int, message: str
) -> None:
    """A short text of a model with room for a long one; ours is what the class computes."""
    hub, prompt, text = make_hub(name), IDS[:1, :7], IDS[:1, :16].copy()
    for i in range(7, 16):
        text[0, i] = hub_logits(hub, text)[0, i - 1].argmax()
    computed = text[0, 7:].tolist()
    assert hub_text(hub, prompt, room)[:9] != computed
    ours = flm.from_keras_hub(hub)
    (written,) = flm.TextGenerator(ours, None).generate_ids(prompt.tolist(), max_new_tokens=9)
    assert list(written) == computed
    with pytest.warns(UserWarning, match=message):
        flm.to_keras_hub(ours)


@pytest.mark.filterwarnings("ignore:Skipping nested container")
def test_kerashubs_saved_llama_forgets_that_its_head_is_tied(tmp_path: Path) -> None:
    hub = make_hub("llama_tied")
    hub.save_to_preset(tmp_path)
    with pytest.raises(ValueError, match="variables"):
        keras_hub.models.Backbone.from_preset(str(tmp_path))
    assert flm.Backbone.from_preset(tmp_path).config.tie_word_embeddings


def test_kerashub_takes_one_of_two_classes_for_a_gemma4(monkeypatch: pytest.MonkeyPatch) -> None:
    """The order is that of a set: each may be the first."""
    from keras_hub.src.utils import preset_utils

    models, found = keras_hub.models, preset_utils.list_subclasses(keras_hub.models.CausalLM)
    taken = set()
    for order in (found, found[::-1]):
        monkeypatch.setattr(preset_utils, "list_subclasses", lambda _, order=order: order)
        kind = preset_utils.find_subclass("", models.CausalLM, models.Gemma4Backbone)
        taken.add(kind.__name__)
    assert taken == {"Gemma4CausalLM", "Gemma4AssistantCausalLM"}


def test_kerashubs_enable_lora_finds_nothing_in_a_gemma3n() -> None:
    with uninitialized():
        hub = keras_hub.models.Gemma3nBackbone(**MODELS["gemma3n"][1])
    hub.enable_lora(3)
    assert not hub.trainable_weights
    hub.enable_lora(3, target_layer_names=["q_proj", "v_proj"])
    assert len(hub.trainable_weights) == 4 * 2 * 2  # layers, kernels, parts of an adapter


def test_kerashub_reads_neither_epsilon_nor_stretched_rope_of_a_llama(tmp_path: Path) -> None:
    """Out of a directory that Transformers 5 has written."""
    rope = CONFIGS["llama_llama3"]["rope_parameters"]
    save_reference({**CONFIGS["llama_llama3"], "rms_norm_eps": 1e-5}, tmp_path)
    hub = keras_hub.models.Backbone.from_preset(str(tmp_path))
    assert hub.rope_frequency_adjustment_factor is None
    assert hub.layer_norm_epsilon == 1e-6
    right = flm.to_keras_hub(flm.Backbone.from_preset(tmp_path))
    assert right.rope_frequency_adjustment_factor == rope["factor"]
    assert right.layer_norm_epsilon == 1e-5
