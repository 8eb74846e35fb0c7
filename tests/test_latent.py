"""Latent attention: one token absorbed, edits of what expands, files of its own kinds."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import torch
import transformers
from keras import ops
from safetensors.torch import load_file as load_torch
from safetensors.torch import save_file

import functional_llm as flm
from configs import CONFIGS
from functional_llm.backbones import latent
from functional_llm.backbones.families import FAMILIES
from functional_llm.formats.float8 import scaled_back
from functional_llm.formats.hf_config import read_config
from functional_llm.formats.hf_directory import HuggingFaceDirectory
from functional_llm.formats.safetensors_reader import open_safetensors
from functional_llm.kernels import Mask
from functional_llm.layers.cache import make_cache, token_sizes
from functional_llm.layers.latent import LatentProduct
from pair import compiled, random_tokens
from reference import make_reference, reference_logits, save_reference

TOKENS = random_tokens(2, 9)
BOTH = ["**/product/key", "**/product/value"]


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("minicpm3")
    config = {**CONFIGS["minicpm3_multipliers"], "num_hidden_layers": 1, "q_lora_rank": None}
    save_reference(config, folder)
    return flm.Backbone.from_preset(folder)


def _lora(model: Any, targets: Any = ("key", "value")) -> Any:
    return _moved(flm.peft.lora(model, rank=2, targets=list(targets), seed=0))


def _moved(model: Any) -> Any:
    random = np.random.default_rng(1)
    for variable in model.trainable_variables:
        variable.assign(variable + random.normal(0, 0.1, variable.shape).astype("float32"))
    return model


def _with_part(where: str) -> Callable[[Any], Any]:
    """Puts a part behind a layer, which makes it another than a product with a matrix."""

    def edit(model: Any) -> Any:
        def bound(layer: Any, path: str) -> Any:
            def body(inputs: Any) -> Any:
                return keras.tree.map_structure(ops.tanh, layer(inputs))

            return flm.CompositeLayer(body, name=layer.name)

        return flm.rewire(model, bound, where=where)

    return edit


def _product(model: Any) -> LatentProduct:
    layers = [x for _, x in flm.walk(model, composites=True) if isinstance(x, LatentProduct)]
    return layers[0]


class Halved(keras.layers.Dense):
    """A layer of a user's own that says by which matrix it multiplies."""

    def call(self, x: Any, training: bool | None = None) -> Any:
        return super().call(x) / 2

    def product_matrix(self) -> Any:
        return self.kernel / 2


def _halved(model: Any) -> Any:
    def halve(layer: Any, path: str) -> Any:
        new = Halved(layer.units, use_bias=False, name=layer.name)
        new.build_from_config(layer.get_build_config())
        new.kernel.assign(layer.kernel)
        return new

    return flm.rewire(model, halve, where=BOTH)


# Edit -> whether one token is still absorbed.
EDITS: dict[str, tuple[Callable[[Any], Any], bool]] = {
    "none": (lambda model: model, True),
    "lora": (_lora, True),
    "lora on both latents": (lambda model: _lora(model, ["latent", "query", "key"]), True),
    "two adapters": (lambda model: _moved(flm.peft.dora(_lora(model), 2, adapter_name="b")), True),
    "ia3": (lambda model: _moved(flm.peft.ia3(model, ["key", "value"])), True),
    "int8": (flm.quantize, True),
    "int4": (lambda model: flm.quantize(model, "int4/2", BOTH), True),
    "lora on int8": (lambda model: _lora(flm.quantize(model)), True),
    "merged": (lambda model: flm.peft.merge(_lora(model)), True),
    "biases": (lambda model: _moved(flm.peft.bitfit(model)), False),
    "a layer of one's own": (_halved, True),
    "a part behind the key": (_with_part("**/product/key"), False),
    "a part behind the latent": (_with_part("**/product/latent_part"), False),
    "a part behind the heads": (_with_part("**/product/heads"), False),
    "a part behind what attends": (_with_part("**/product/dot_product"), False),
    "a part behind the product": (_with_part("**/attention/product"), True),
    "captured": (lambda model: flm.capture(model, "**/product/key"), False),
}


@pytest.mark.parametrize("edit", EDITS)
def test_one_token_through_the_cache_is_the_whole_text(backbone: Any, edit: str) -> None:
    change, is_absorbed = EDITS[edit]
    model = change(backbone)
    run = compiled(model)
    result = run({"token_ids": TOKENS, "cache": make_cache(model, 2, 9)})
    last = {"token_ids": TOKENS[:, 8:], "positions": np.full((2, 1), 8, "int32")}
    again = run({**last, "cache": result["cache"]})
    expected = result["logits"][:, 8]
    np.testing.assert_allclose(again["logits"][:, 0], expected, atol=1e-5)
    assert (_product(model).absorbable() is not None) == is_absorbed
    if edit not in ("none", "captured", "int8", "int4"):
        plain = compiled(backbone)(TOKENS)[:, 8]
        assert np.abs(plain - expected).max() > 1e-3


def test_dropout_of_an_adapter_counts_for_one_token_that_trains(backbone: Any) -> None:
    model = _moved(flm.peft.lora(backbone, rank=2, targets=["key"], dropout=0.5, seed=0))
    run = _product(model)
    random, shapes = np.random.default_rng(0), {"query": (1, 1, 3, 10), "latent": (1, 2, 18)}
    inputs: dict[str, Any] = {"mask": Mask(mask=np.ones((1, 1, 2), bool)).to_tensors()}
    inputs |= {key: random.normal(size=shape).astype("float32") for key, shape in shapes.items()}
    runs = [np.asarray(run(inputs, training=training)) for training in (True, True, False, False)]
    assert np.abs(runs[0] - runs[1]).max() > 1e-4
    np.testing.assert_array_equal(runs[2], runs[3])


def test_a_cache_keeps_one_vector_of_a_token(backbone: Any) -> None:
    cache = make_cache(backbone, 2, 7)["full_attention"]
    assert cache["decoder_0"]["attention"]["latent"].shape == (2, 7, 14 + 4)
    assert token_sizes(backbone, 7) == 7 * 4 * (18 + 1)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_adapters_of_peft_on_every_matrix(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    name = "deepseek_v3_groups"
    make_reference(CONFIGS[name]).save_pretrained(tmp_path)
    backbone = flm.Backbone.from_preset(tmp_path)
    targets = ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=targets)
    theirs = peft.get_peft_model(make_reference(CONFIGS[name]), config).eval()
    with torch.no_grad():
        for key, parameter in theirs.named_parameters():
            if "lora" in key:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = flm.peft.load_adapter(backbone, tmp_path / "theirs")
    run, expected = compiled(ours), reference_logits(theirs, TOKENS)
    assert np.abs(compiled(backbone)(TOKENS) - expected).max() > 1e-2
    result = run({"token_ids": TOKENS, "cache": make_cache(ours, 2, 9)})
    np.testing.assert_allclose(result["logits"], expected, atol=1e-4)
    last = {"token_ids": TOKENS[:, 8:], "positions": np.full((2, 1), 8, "int32")}
    again = run({**last, "cache": result["cache"]})
    np.testing.assert_allclose(again["logits"][:, 0], expected[:, 8], atol=1e-4)
    flm.peft.save_adapter(ours, tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(make_reference(CONFIGS[name]), tmp_path / "ours").eval()
    np.testing.assert_allclose(reference_logits(back, TOKENS), expected, atol=1e-4)


FLOAT8 = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [128, 128],
}


def _in_float8(folder: Path) -> None:
    """Puts float8 in the place of the matrices of a directory, as DeepSeek publishes them."""
    tensors = load_torch(folder / "model.safetensors")
    for name in [x for x in tensors if x.endswith("_proj.weight")]:
        shape = [-(-size // 128) for size in tensors[name].shape]
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = torch.rand(shape) + 0.5
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": FLOAT8}))


@pytest.fixture(scope="module")
def float8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("float8")
    # Transformers takes no part of a block beside whole ones, which DeepSeek's files have.
    sizes = {"hidden_size": 128, "intermediate_size": 256, "kv_lora_rank": 124}
    sizes |= {"num_hidden_layers": 1, "first_k_dense_replace": 1}
    save_reference({**CONFIGS["deepseek_v3_groups"], **sizes}, folder)
    _in_float8(folder)
    return folder


def test_float8_tensors_are_what_transformers_makes_of_them(float8: Path) -> None:
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        float8,
        attn_implementation="eager",
        dtype=torch.float32,
        quantization_config=transformers.FineGrainedFP8Config(dequantize=True),
    ).eval()
    ours = flm.Backbone.from_preset(float8)
    expected = reference_logits(theirs, TOKENS)
    np.testing.assert_allclose(compiled(ours)(TOKENS), expected, atol=1e-4)


def test_parts_of_blocks_have_scales_too(tmp_path: Path) -> None:
    """As DeepSeek's `weight_dequant` (inference/kernel.py) multiplies them."""
    random = torch.Generator().manual_seed(0)
    x = torch.randn(300, 130, generator=random).to(torch.float8_e4m3fn)
    scales = torch.rand(3, 2, generator=random)
    tensors = {"x.weight": x, "x.weight_scale_inv": scales, "y": scales.clone()}
    save_file(tensors, tmp_path / "model.safetensors")
    source = scaled_back(open_safetensors(tmp_path))
    assert dict(source.shapes) == {"x.weight": (300, 130), "y": (3, 2)}
    expected = x.float().numpy() * np.kron(scales.numpy(), np.ones((128, 128)))[:300, :130]
    np.testing.assert_allclose(source.read("x.weight", "float32"), expected, rtol=1e-6)
    np.testing.assert_array_equal(source.read("y", "float32"), scales.numpy())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight_block_size": [64, 64]}, "does not handle: quantization_config="),
        ({"fmt": "e5m2"}, "does not handle: quantization_config="),
        ({"quant_method": "gptq"}, "does not handle: quantization_config="),
    ],
)
def test_other_float8_is_refused(float8: Path, changes: Any, message: str) -> None:
    raw = json.loads((float8 / "config.json").read_text())
    raw["quantization_config"] |= changes
    with pytest.raises(ValueError, match=message):
        read_config(raw, FAMILIES["deepseek_v3"])


def test_float8_without_its_scales_is_refused_by_name(float8: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((float8 / "config.json").read_text())
    tensors = load_torch(float8 / "model.safetensors")
    name = "model.layers.0.self_attn.o_proj.weight"
    del tensors[f"{name}_scale_inv"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=rf"'{name}' of shape .*expected '{name}_scale_inv'"):
        flm.Backbone.from_preset(tmp_path)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("deepseek_v3_groups", {"num_key_value_heads": 1}, "expected num_key_value_heads=3"),
        ("deepseek_v3_groups", {"qk_head_dim": 11}, "expected qk_head_dim=10"),
        ("deepseek_v3_groups", {"head_dim": 11}, "expected head_dim and qk_rope_head_dim to say"),
        ("deepseek_v3_groups", {"n_group": 3}, "expected n_group that divides"),
        ("deepseek_v3_groups", {"topk_group": 5}, "topk_group=5"),
        ("deepseek_v3_groups", {"num_experts_per_tok": 5}, "num_experts_per_tok=5"),
        ("deepseek_v3_groups", {"scoring_func": "softmax"}, "scoring_func='softmax'"),
        ("deepseek_v2_groups_yarn", {"topk_method": "noaux_tc"}, "received 'noaux_tc'"),
        ("deepseek_v2_groups_yarn", {"norm_topk_prob": True}, "norm_topk_prob=True"),
        ("deepseek_v2_groups_yarn", {"first_k_dense_replace": -1}, "first_k_dense_replace"),
    ],
)
def test_numbers_that_do_not_fit(name: str, changes: Any, message: str) -> None:
    raw = {**CONFIGS[name], **changes}
    with pytest.raises(ValueError, match=message):
        read_config(raw, FAMILIES[raw["model_type"]])


def test_kimi_k2_is_a_deepseek_v3(tmp_path: Path) -> None:
    raw = {**CONFIGS["deepseek_v3_groups"], "model_type": "kimi_k2"}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    source = HuggingFaceDirectory(tmp_path, FAMILIES)
    assert source.family.model_type == "deepseek_v3"
    assert source.config.hidden_dim == 24


def test_sizes_in_old_and_new_gguf_files() -> None:
    own = {"attention.key_length": 12, "attention.value_length": 5, "attention.kv_lora_rank": 14}
    new = {
        **own,
        "attention.key_length": 18,
        "attention.value_length": 14,
        "attention.key_length_mla": 12,
        "attention.value_length_mla": 5,
        "attention.head_count_kv": 1,
    }
    assert latent.gguf_given(new) == own
    assert latent.gguf_given({**own, "attention.head_count_kv": 3}) == own
