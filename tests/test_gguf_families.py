"""Every family out of a GGUF file that llama.cpp's own converter wrote."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers

import functional_llm as flm
from configs import CONFIGS
from functional_llm.formats.gguf_model import part_of_head
from mxfp4_files import load_packed, pack_experts
from nightly import LAYOUTS
from pair import compiled
from reference import reference_logits, save_reference

_LATENT_YARN = CONFIGS["deepseek_v2_groups_yarn"]["rope_parameters"]
_PHIMOE_ROPE = CONFIGS["phimoe_long_texts_magnitudes"]["rope_parameters"]
_MAGNITUDES = ("short_mscale", "long_mscale")
# What a GGUF file cannot say is as llama.cpp takes it: the scale of scores, RoPE of local layers,
# the activation.
SAID: dict[str, dict[str, Any]] = {
    "llama_multi_head_tied": {},
    "llama_biases": {"hidden_act": "silu"},
    "llama_head_size": {},
    "llama_llama3": {},
    "llama_linear": {},
    "llama_yarn": {},
    "mistral_no_window_head_size": {},
    "qwen2_tied": {},
    "qwen2_yarn_multi_query": {},
    "qwen3_head_size": {},
    "qwen3_tied_multi_head": {},
    "qwen3_moe_some_dense": {"mlp_only_layers": []},
    "qwen2_moe_some_dense": {"mlp_only_layers": [], "norm_topk_prob": False},
    "qwen2_moe_all_chosen_tied": {},
    "mixtral_two_of_five": {},
    "mixtral_all_chosen_tied": {},
    "olmoe_multi_head": {},
    "smollm3_nope_slides": {
        "num_hidden_layers": 4,  # the last does not turn, and none has a window
        "no_rope_layers": None,
        "use_sliding_window": False,
        "sliding_window": None,
    },
    "olmo2_norms_over_all_heads": {},
    "olmo2_tied_yarn_multi_head": {},
    "olmo3_yarn_in_full_layers": {},
    "granite_multipliers": {},
    "granite_biases_tied": {"head_dim": 12, "mlp_bias": False},
    "seed_oss_biases_head_size": {},
    "hunyuan_alpha_norm_after_rope": {
        "max_position_embeddings": 32768,
        "tie_word_embeddings": True,
    },
    "exaone4_nope_in_full_layers": {},
    "exaone4_pattern_llama3_multi_query": {"layer_types": ["sliding_attention", "full_attention"]},
    "ministral3_growing_queries": {},
    "gemma_grouped": {},
    "gemma2_soft_caps": {"query_pre_attn_scalar": 16},
    "gemma3_default_pattern": {"query_pre_attn_scalar": 16},
    "gpt2_tied": {},
    "glm4_half_of_each_head": {},
    "glm4_no_biases_multi_head": {"hidden_act": "silu"},
    "phi3_long_texts": {"original_max_position_embeddings": 32},
    "phi3_window_multi_head": {},
    "gpt2_one_layer_one_head": {"activation_function": "gelu_new"},
    "phimoe_long_texts_magnitudes": {
        # To llama.cpp, both factors follow from the lengths.
        "rope_parameters": {**_PHIMOE_ROPE, **dict.fromkeys(_MAGNITUDES, 1.125**0.5)}
    },
    "starcoder2_linear_one_layer": {},
    "starcoder2_no_biases_untied": {"hidden_act": "gelu_pytorch_tanh"},
    "phi_half_of_each_head": {},
    "stablelm_quarter_of_each_head": {},
    "stablelm_parallel_biases": {},
    "stablelm_norm_of_each_head": {},
    "cohere_pairs": {},
    "cohere_query_key_norm_untied": {"tie_word_embeddings": True},
    "cohere2_default_pattern": {},
    "nemotron_half_of_each_head": {},
    "nemotron_one_layer_linear": {},
    "ernie4_5_pairs_head_size": {},
    "ernie4_5_yarn_one_layer": {},
    "gpt_neox_five_heads": {},
    "gpt_neox_serial_theta": {
        "rotary_pct": 0.35,
        "rotary_emb_base": 10000,
        "hidden_act": "gelu",
    },
    "gpt_neox_no_biases_tied": {"rope_parameters": None},
    "bloom_five_heads": {},
    "bloom_twelve_heads_untied": {},
    "falcon_grouped_two_norms": {},
    "falcon_grouped_one_norm_one_layer": {"ffn_hidden_size": 192, "activation": "gelu"},
    "apertus_default_rope": {},
    "apertus_llama3_biases_tied": {},
    "falcon_multi_query_untied": {"rope_parameters": None},
    "granitemoe_multipliers": {},
    "granitemoe_one_of_eighty_tied": {},
    "gpt_oss_clamped": {"swiglu_limit": 7.0},
    "gpt_oss_all_chosen_no_biases_tied": {"swiglu_limit": 7.0},
    "deepseek_v2_groups_yarn": {
        "rope_parameters": {**_LATENT_YARN, "mscale": 0.7, "mscale_all_dim": 0.7}
    },
    "deepseek_v2_greedy_direct_queries": {},
    "deepseek_v3_groups": {},
    "minicpm3_multipliers": {
        "scale_emb": 12,
        "scale_depth": 1.4,
        "dim_model_base": 256,
        "v_head_dim": 8,
    },
    "llama4_chunks_then_all": {
        "num_hidden_layers": 4,  # every fourth sees all; sizes of chunks are those of Scout
        "no_rope_layer_interval": 4,
        "attention_chunk_size": 8192,
        "floor_scale": 8192,
        "attn_scale": 0.1,
    },
    "llama4_dense_then_two_chosen_tied": {
        "num_local_experts": 128,  # which llama.cpp takes for Maverick, without norms
        "no_rope_layers": None,
        "no_rope_layer_interval": 4,
        "layer_types": None,
        "attn_temperature_tuning": True,
        "attention_chunk_size": 8192,
        "floor_scale": 8192,
        "attn_scale": 0.1,
    },
    "ernie4_5_moe_two_shared_least_sum": {"moe_norm_min": 1e-12, "use_bias": False},
    "ernie4_5_moe_one_chosen": {"moe_norm_min": 1e-12},
    "glm4_moe_groups": {},  # these say that they have a layer more, which predicts further tokens
    "glm4_moe_one_chosen": {"num_mtp_layers": 0},
    "lfm2_wide_kernel": {},
    "lfm2_old_keys": {},
    "qwen3_5_grouped_values": {},
    "qwen3_5_tied_wide_kernel": {},
    "qwen3_next_grouped_values": {},
    "qwen3_next_some_dense_tied": {"mlp_only_layers": [], "norm_topk_prob": True},
    "qwen3_5_moe_grouped_values": {},
    "lfm2_moe_scaled_after_dense": {"routed_scaling_factor": 1.0},
    "lfm2_moe_all_chosen": {},
    "gemma4_shared_keys": {},
    "gemma4_values_are_keys": {},
    "gemma3n_streams": {  # llama.cpp knows one rank, and converts four streams
        "laurel_rank": 64,
        "altup_num_inputs": 4,
        "vocab_size_per_layer_input": 128,
    },
    "gemma4_experts": {"num_global_key_value_heads": 1},  # without an effect
    "kimi_linear_nets_then_attention": {},
    "mamba2_groups": {},
    "mamba_default_rank": {},
    "mamba_biases_untied": {"use_bias": False, "use_conv_bias": True},
    "mamba2_one_layer_no_convolution_bias": {"use_conv_bias": True},
    "granitemoehybrid_experts": {"mamba_proj_bias": False, "time_step_limit": [0.0, 1e9]},
    # Not one with a tied head: the converter folds the embedding's multiplier into both.
    "falcon_h1_multipliers": {"head_dim": 8},
    "nemotron_h_four_mixers": {
        **{"hybrid_override_pattern": "E*M", "n_group": 1},
        "num_nextn_predict_layers": 1,  # which is not read
    },
    "nemotron_h_experts_of_latents_first_biases": {
        **dict.fromkeys(("mlp_bias", "use_bias"), False),
        **{"norm_topk_prob": True, "use_conv_bias": True, "mlp_hidden_act": "relu2"},
    },
    "nemotron_h_mlp_first_states_last": {
        "residual_in_fp32": False,
    },
}
# Those whose experts are in MXFP4, in the directory and in the GGUF file.
PACKED = {"gpt_oss_clamped"}
# Old keys, which the converter wants.
WANTED: dict[str, dict[str, Any]] = {
    "gpt2": {"n_ctx": 512},
    "mistral": {"architectures": ["Mistral3ForConditionalGeneration"]},  # else it is a Llama's
    "cohere2": {"rotary_pct": 1.0},
    "phimoe": {"architectures": ["PhiMoEForCausalLM"]},  # as the published file has it
    "gpt_neox": {"rotary_pct": 0.35},
    "deepseek_v2": {"scoring_func": "softmax"},
    "deepseek_v3": {"scoring_func": "sigmoid"},
    # It does not convert models without layers that predict further tokens.
    **dict.fromkeys(
        ("qwen3_5_text", "qwen3_5_moe_text", "qwen3_next"), {"mtp_num_hidden_layers": 1}
    ),
    "granitemoehybrid": {"layer_types": ["attention", "mamba"]},
    # Beside `layer_norm_epsilon`, as published files have it; else heads would have to fit to 64.
    "nemotron_h": {"norm_eps": 1e-5, "mamba_d_head": 8},
    # It tells models without experts by the absence of a key, and their layers by the pattern.
    "nemotron_h_mlp_first_states_last": {
        **{"norm_eps": 1e-3, "hybrid_override_pattern": "-*M", "num_experts_per_tok": None},
        "mamba_d_head": 4,
    },
    "kimi_linear": {  # as the published file has it, and newer ones do not
        key: CONFIGS["kimi_linear_nets_then_attention"][key]
        for key in ("linear_attn_config", "first_k_dense_replace", "moe_router_activation_func")
    },
}
# The vocabulary is not what is tested here: the converter shall not look for one it knows.
CONVERT = r"""
import json, re, sys
from pathlib import Path
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/gguf-py"]
import gguf, torch
from conversion import ModelBase, get_model_class
for folder in map(Path, sys.argv[2:]):
    numbers = json.loads((folder / "config.json").read_text())  # Transformers drops old keys
    numbers |= ModelBase.load_hparams(folder, False)
    # Transformers, through which the first goes, drops old keys.
    numbers = ModelBase.load_hparams(folder, False)
    numbers |= json.loads((folder / "config.json").read_text())
    if numbers.get("num_experts_per_tok", 0) is None:
        del numbers["num_experts_per_tok"]
    converter = get_model_class(numbers["architectures"][0])
    def set_vocab(self):
        self.gguf_writer.add_tokenizer_model("none")
        self.gguf_writer.add_vocab_size(128)
    modify = converter.modify_tensors
    def modify_tensors(self, data, name, *args, modify=modify):
        # Transformers writes the one MLP of a Kimi Linear's layer among the experts.
        name = re.sub(r"block_sparse_moe(?=\.(gate|up|down)_proj)", "mlp", name)
        # StableLM's returns norms, as it did before it yielded the other tensors.
        yield from (yield from modify(self, data, name, *args)) or ()
    converter.modify_tensors = modify_tensors
    if not (folder / "rwkv_vocab_v20230424.txt").exists():
        for kind in (converter, getattr(converter, "Ministral3Model", converter)):
            kind.set_vocab = set_vocab
    with torch.inference_mode():
        path = folder / "model.gguf"
        converter(folder, gguf.LlamaFileType.ALL_F32, path, eager=True, hparams=numbers).write()
"""


@pytest.fixture(scope="module")
def converted(
    llama_cpp: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> dict[str, Any]:
    """Name -> Transformers' model and the folder with its GGUF file; one process converts all."""
    models = {}
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.BPE({chr(200 + i): i for i in range(128)}, [])
    )
    asking = [x for x in request.session.items if "converted" in getattr(x, "fixturenames", ())]
    asked = {x.callspec.params["name"] for x in asking}  # type: ignore[attr-defined]
    for name, changes in SAID.items():
        if name not in asked:
            continue
        folder = tmp_path_factory.mktemp(name)
        model = save_reference({**CONFIGS[name], **changes}, folder)
        if name in PACKED:
            pack_experts(folder)
            model = load_packed(folder)
        models[name] = (model, folder)
        tokenizer.save(str(folder / "tokenizer.json"))
        if wanted := WANTED.get(name, WANTED.get(CONFIGS[name]["model_type"])):
            config = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps({**config, **wanted}))
    folders = [str(folder) for _, folder in models.values()]
    command = [sys.executable, "-c", CONVERT, str(llama_cpp), *folders]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return models


_FIRSTS = {CONFIGS[name]["model_type"]: name for name in reversed(SAID)}.values()


@pytest.mark.real
@pytest.mark.tiny
@pytest.mark.nightly(unless=lambda x: x["name"] in _FIRSTS or x["name"] in LAYOUTS)
@pytest.mark.parametrize("name", SAID)
def test_logits_out_of_a_gguf_file(converted: dict[str, Any], name: str) -> None:
    reference, folder = converted[name]
    token_ids = np.random.default_rng(0).integers(0, 128, (2, 40))
    backbone = flm.Backbone.from_preset(folder / "model.gguf")
    logits = compiled(backbone)(token_ids)
    expected = reference_logits(reference, token_ids)
    np.testing.assert_allclose(logits, expected, atol=1e-4, rtol=0)


def test_a_part_of_a_head_is_what_the_file_says() -> None:
    sizes = [(part, whole) for whole in range(1, 257) for part in range(1, whole + 1)]
    assert all(int(whole * part_of_head(part, whole)) == part for part, whole in sizes)
