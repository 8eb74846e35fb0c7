"""What PEFT's files hold beside a method, for every family, both ways: logits and tensors."""

import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import keras
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

import functional_llm as flm
from configs import CONFIGS
from functional_llm.peft.peft_format import _read_ia3
from functional_llm.peft.peft_targets import target_modules
from nightly import FAMILIES_AND_KINDS, LAYOUTS
from pair import compiled
from reference import make_reference, reference_logits, save_reference

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    theirs = pytest.importorskip("peft")

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
    pytest.mark.filterwarnings("ignore:`init_lora_weights` is 'eva' but"),
    pytest.mark.filterwarnings("ignore:lora with eva initialization used with low_cpu"),
    pytest.mark.filterwarnings("ignore:.*not supported for PeftType.LORA"),
    pytest.mark.filterwarnings("ignore:You have requested `ensure_weight_tying`, but"),
]

IDS = np.random.default_rng(0).integers(0, 128, (1, 9)).astype("int32")
IDS[0, :3] = 3, 7, 9  # tokens that some settings train
# Of Mamba, PEFT adapts hardly any linear layers; RWKV has no queries.
_OTHERS = [name for name in FAMILIES_AND_KINDS if not name.startswith(("mamba", "rwkv"))]
NAMES = [*_OTHERS, "llama_multi_head_tied", "llama_biases", "gpt2_untied_inner"]


def _names_of(backbone: flm.Backbone) -> dict[str, Any]:
    """Returns what the checkpoints call the embedding, two projections, the first and last norm."""
    modules = backbone.peft_names.modules
    # PEFT takes the names of a plain MLP for those of experts: test_peft_experts.py.
    has_experts = bool(backbone.peft_names.parameters)
    parts = ("attention/query", "attention/output" if has_experts else "mlp/up")
    projections = [modules[f"decoder_0/{part}"] for part in parts]
    tensors = backbone.peft_names.tensors
    norms = [x.name.rpartition(".")[0] for x in tensors if "norm/" in x.paths[0]]
    first = [name for name in norms if ".0." in name]
    outside = [name for name in norms if not re.search(r"\.\d+\.", name)]
    return {
        "embedding": modules["token_embedding"].rpartition(".")[2],
        "targets": [name.rpartition(".")[2] for name in projections],
        "norms": [first[0], *outside[-1:]],
        "is_fused": any(list(modules.values()).count(name) > 1 for name in projections),
    }


@pytest.fixture(scope="module", params=NAMES)
def one(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp(request.param)
    reference = save_reference(CONFIGS[request.param], folder)
    backbone = flm.Backbone.from_preset(folder)
    return SimpleNamespace(
        folder=folder,
        make=lambda: make_reference(CONFIGS[request.param]),
        backbone=backbone,
        base=reference_logits(reference, IDS),
        **_names_of(backbone),
    )


def _noise(model: Any) -> None:
    """Moves all that trains, so that a wrong one shows."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


LORA: dict[str, Any] = {"r": 3, "lora_alpha": 5, "task_type": "CAUSAL_LM"}
# Our `logits` need one compilation each, so a setting says many things at once.
SETTINGS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "head": lambda x: {"target_modules": [*x.targets, "lm_head"]},
    "embedding": lambda x: {"target_modules": [x.embedding, *x.targets], "use_rslora": True},
    "dora of the embedding": lambda x: {
        "target_modules": [x.embedding, *x.targets[1:]],
        "use_dora": True,
    },
    "bias of targets": lambda x: {"target_modules": x.targets, "bias": "lora_only"},
    "all biases": lambda x: {"target_modules": x.targets, "bias": "all", "lora_dropout": 0.1},
    "whole modules": lambda x: {
        "target_modules": x.targets,
        "modules_to_save": ["lm_head", *x.norms],
    },
    "embedding and mlp": lambda x: {
        "target_modules": x.targets[:1],
        "modules_to_save": [x.embedding, "mlp"],
    },
    "tokens": lambda x: {"target_modules": x.targets, "trainable_token_indices": [7, 3, 90]},
    "named tokens": lambda x: {
        "target_modules": x.targets,
        "trainable_token_indices": {x.embedding: [9, 4]},
    },
    "tokens of both": lambda x: {
        "target_modules": x.targets,
        "trainable_token_indices": {x.embedding: [9, 4], "lm_head": [7, 3, 5]},
    },
    "tokens of the head": lambda x: {
        "target_modules": x.targets,
        "trainable_token_indices": {"lm_head": [7, 3, 5]},
    },
    "a module and all biases": lambda x: {
        "target_modules": x.targets[:1],
        "modules_to_save": ["mlp"],
        "bias": "all",
    },
    "regex": lambda x: {
        "target_modules": r".*\.(0|1)\..*(c_attn|q_proj)",
        "init_lora_weights": "gaussian",
    },
    "eva": lambda x: {"target_modules": x.targets, "init_lora_weights": "eva"},
    "orthogonal": lambda x: {
        "target_modules": x.targets,
        "init_lora_weights": "orthogonal",
        "r": 2,
    },
    "random": lambda x: {"target_modules": "all-linear", "init_lora_weights": False},
}


# What else PEFT writes for a tied embedding with `ensure_weight_tying`.
TIED_SETTINGS: dict[str, dict[str, Any]] = {
    "lora": {"target_modules": ["embed_tokens", "q_proj"]},
    "lora of the head": {"target_modules": ["lm_head", "q_proj"], "use_dora": True},
    "module": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [7, 3]},
}


@pytest.mark.parametrize("one", ["llama_multi_head_tied"], indirect=True)
@pytest.mark.parametrize("setting", TIED_SETTINGS)
def test_an_embedding_and_a_head_that_train_together(
    one: Any, setting: str, tmp_path: Path
) -> None:
    config = theirs.LoraConfig(**LORA, **TIED_SETTINGS[setting], ensure_weight_tying=True)
    model = theirs.get_peft_model(one.make(), config).eval()
    _noise(model)
    model.save_pretrained(tmp_path)
    ours = flm.peft.load_adapter(one.backbone, tmp_path)
    np.testing.assert_allclose(ours(IDS), reference_logits(model, IDS), atol=1e-4, rtol=0)


@pytest.mark.parametrize("one", ["llama_multi_head_tied", "gpt2_untied_inner"], indirect=True)
@pytest.mark.parametrize("target", [None, "lm_head"])
def test_tokens_that_train_alone(one: Any, target: str | None, tmp_path: Path) -> None:
    options = {} if target is None else {"target_modules": [target]}
    config = theirs.TrainableTokensConfig(
        token_indices=[7, 3, 90], task_type="CAUSAL_LM", **options
    )
    model = theirs.get_peft_model(one.make(), config).eval()
    _noise(model)
    model.save_pretrained(tmp_path)
    expected = reference_logits(model, IDS)
    assert np.abs(expected - one.base).max() > 1e-2
    ours = flm.peft.load_adapter(one.backbone, tmp_path)
    np.testing.assert_allclose(ours(IDS), expected, atol=1e-4, rtol=0)


# Every setting for two models that have all parts; the others for what differs in them. What a
# family calls its modules: test_peft_interchange.py.
EVERY = ["gpt2_tied", "llama_biases"]
OF_TIED = [
    "embedding",
    "dora of the embedding",
    "embedding and mlp",
    "tokens",
    "tokens of both",
    "tokens of the head",
]
BY_DAY = [*LAYOUTS, "llama_multi_head_tied", *EVERY, "gpt2_untied_inner"]


def _is_of_the_day(name: str, setting: str) -> bool:
    """The two that have every setting take them in turns."""
    place = list(SETTINGS).index(setting)
    return name in BY_DAY and (name not in EVERY or place % len(EVERY) == EVERY.index(name))


CASES = [
    pytest.param(name, setting, marks=() if _is_of_the_day(name, setting) else pytest.mark.nightly)
    for name in NAMES
    for setting in SETTINGS
    if name in EVERY
    or setting in ("head", "whole modules")
    or (name == "llama_multi_head_tied" and setting in OF_TIED)
]


@pytest.mark.parametrize(("one", "setting"), CASES, indirect=["one"])
def test_what_peft_saved_and_what_we_save_of_it(one: Any, setting: str, tmp_path: Path) -> None:
    options = LORA | SETTINGS[setting](one)
    model = theirs.get_peft_model(one.make(), theirs.LoraConfig(**options)).eval()
    _noise(model)
    model.save_pretrained(tmp_path / "theirs")
    if setting == "whole modules":  # PEFT passes over names that it does not find
        saved = load_file(tmp_path / "theirs" / "adapter_model.safetensors")
        assert all(f"base_model.model.{name}.weight" in saved for name in one.norms)
    expected = reference_logits(model, IDS)
    assert np.abs(expected - one.base).max() > 1e-2
    ours = flm.peft.load_adapter(one.backbone, tmp_path / "theirs")
    np.testing.assert_allclose(compiled(ours)(IDS), expected, atol=1e-4, rtol=0)
    flm.peft.save_adapter(ours, tmp_path / "ours")
    again = theirs.PeftModel.from_pretrained(one.make(), str(tmp_path / "ours")).eval()
    np.testing.assert_allclose(reference_logits(again, IDS), expected, atol=1e-4, rtol=0)
    if not one.is_fused:  # where three layers are one module, factors are put together
        _same_tensors(tmp_path / "theirs", tmp_path / "ours")


def _same_tensors(theirs: Path, ours: Path) -> None:
    a, b = (load_file(folder / "adapter_model.safetensors") for folder in (theirs, ours))
    # Written twice, or, of a head that is a target, as it is in the base.
    others = [".base_layer.weight", ".original_module.", ".modules_to_save."]
    others.append("lm_head.base_layer.bias")
    a = {name: x for name, x in a.items() if not any(part in name for part in others)}
    assert set(a) == set(b)
    for name, array in a.items():
        np.testing.assert_array_equal(b[name], array, err_msg=name)


@pytest.mark.parametrize("one", ["llama_multi_head_tied", "gpt2_tied"], indirect=True)
def test_merging_freezing_and_switching(one: Any, tmp_path: Path) -> None:
    model = flm.peft.lora(one.backbone, 2, targets=["token_embedding", "up"])
    model = flm.peft.retrain(model, "final_norm")
    model = flm.peft.train_tokens(model, [7, 3])
    own = {v.path.rpartition("/")[2] for v in model.trainable_variables}
    assert own >= {"lora_a", "lora_b", "rows"}
    assert not {id(v) for v in model.trainable_variables} & {id(v) for v in one.backbone.variables}
    base = compiled(one.backbone)(IDS)
    np.testing.assert_allclose(compiled(model)(IDS), base, atol=1e-5, rtol=0)
    kept = [np.array(v) for v in model.trainable_variables]
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.1), loss)
    model.fit(IDS[:, :-1], IDS[:, 1:], epochs=2, verbose=0)
    assert all(
        np.any(np.array(v) != x) for v, x in zip(model.trainable_variables, kept, strict=True)
    )
    np.testing.assert_array_equal(compiled(one.backbone)(IDS), base)
    rng = np.random.default_rng(2)
    for variable in model.trainable_variables:
        variable.assign_add(rng.normal(size=variable.shape).astype("float32") * 0.1)
    run = compiled(model)
    moved = run(IDS)
    assert np.abs(moved - base).max() > 1e-2
    np.testing.assert_allclose(compiled(flm.peft.merge(model))(IDS), moved, atol=1e-4, rtol=0)
    flm.peft.activate(model, None)
    np.testing.assert_array_equal(run(IDS), base)
    flm.peft.activate(model, "default")
    model.save(tmp_path / "model.keras")
    again = flm.Backbone.from_preset(tmp_path / "model.keras")
    np.testing.assert_allclose(compiled(again)(IDS), moved, atol=1e-5, rtol=0)
    flm.peft.activate(again, None)
    np.testing.assert_allclose(compiled(again)(IDS), base, atol=1e-5, rtol=0)


@pytest.mark.parametrize("one", ["llama_grouped"], indirect=True)
def test_in_half_precision(one: Any) -> None:
    backbone = flm.Backbone.from_preset(one.folder, dtype="bfloat16")
    model = flm.peft.retrain(flm.peft.lora(backbone, 2), ["final_norm", "head"])
    assert {v.dtype for v in model.trainable_variables} == {"float32"}
    base = np.asarray(backbone(IDS), "float32")
    np.testing.assert_array_equal(np.asarray(model(IDS), "float32"), base)
    merged = flm.peft.merge(model)
    assert [v.dtype for v in merged.variables] == [v.dtype for v in backbone.variables]
    np.testing.assert_array_equal(np.asarray(merged(IDS), "float32"), base)


@pytest.mark.parametrize("one", ["llama_grouped"], indirect=True)
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_parts_of_the_base(one: Any, init: str, tmp_path: Path) -> None:
    config = theirs.LoraConfig(**LORA, target_modules=one.targets, init_lora_weights=init)
    model = theirs.get_peft_model(one.make(), config).eval()
    _noise(model)
    model.save_pretrained(tmp_path)
    ours = flm.peft.load_adapter(one.backbone, tmp_path)
    np.testing.assert_allclose(compiled(ours)(IDS), reference_logits(model, IDS), atol=1e-4, rtol=0)
    fresh = flm.peft.lora(one.backbone, 3, init=init)
    np.testing.assert_allclose(compiled(fresh)(IDS), one.base, atol=1e-4, rtol=0)


@pytest.mark.parametrize("one", ["llama_grouped"], indirect=True)
def test_a_base_that_was_changed_comes_with_the_adapter(one: Any, tmp_path: Path) -> None:
    config = theirs.LoraConfig(**LORA, target_modules=["lm_head", *one.targets])
    model = theirs.get_peft_model(one.make(), config).eval()
    with torch.no_grad():
        model.base_model.model.lm_head.base_layer.weight.add_(0.05)
    model.save_pretrained(tmp_path)
    expected = reference_logits(model, IDS)
    ours = flm.peft.load_adapter(one.backbone, tmp_path)
    np.testing.assert_allclose(compiled(ours)(IDS), expected, atol=1e-4, rtol=0)
    flm.peft.save_adapter(ours, tmp_path / "ours")
    again = theirs.PeftModel.from_pretrained(one.make(), str(tmp_path / "ours")).eval()
    np.testing.assert_allclose(reference_logits(again, IDS), expected, atol=1e-4, rtol=0)


def _edit(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("one", ["llama_multi_head_tied"], indirect=True)
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"init_lora_weights": "loftq"}, "'loftq' quantises the base"),
        ({"init_lora_weights": "corda"}, "'corda' changes the base's weights"),
        ({"init_lora_weights": "pissa_niter_4"}, "path_initial_model_for_weight_conversion"),
        ({"lora_bias": True}, "lora_bias = True gives B a bias"),
        ({"bias": "some"}, "'bias' = 'some' is not supported"),
        ({"layer_replication": [[0, 1]]}, "'layer_replication'"),
        ({"modules_to_save": ["norm"]}, "model.norm.weight' is of a module in modules_to_save"),
        ({"modules_to_save": 3}, "'modules_to_save' = 3 is of another type"),
        ({"rank_pattern": []}, "'rank_pattern' = .* is of another type"),
        ({"target_modules": {"a": 1}}, "'target_modules' = .* is of another type"),
        ({"r": "8"}, "rank of at least 1"),
        ({"peft_type": ["LORA"]}, "peft_type is "),
    ],
)
def test_what_is_not_supported_is_named(
    one: Any, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    flm.peft.save_adapter(flm.peft.lora(one.backbone, 3), tmp_path)
    _edit(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        flm.peft.load_adapter(one.backbone, tmp_path)


@pytest.mark.parametrize("one", ["llama_multi_head_tied"], indirect=True)
def test_peft_opens_our_folder_by_itself(one: Any, tmp_path: Path) -> None:
    from tiny import save_tiny

    base = save_tiny(tmp_path / "base")
    backbone = flm.Backbone.from_preset(base)
    model = flm.peft.lora(backbone, 2, seed=0)
    for variable in model.trainable_variables:
        variable.assign_add(np.full(variable.shape, 0.1, "float32"))
    flm.peft.save_adapter(model, tmp_path / "adapter")
    files = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert files >= {
        "adapter_config.json",
        "adapter_model.safetensors",
        "README.md",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base)
    opened = theirs.AutoPeftModelForCausalLM.from_pretrained(
        tmp_path / "adapter", dtype="float32"
    ).eval()
    np.testing.assert_allclose(
        reference_logits(opened, IDS), compiled(model)(IDS), atol=1e-4, rtol=0
    )
    from huggingface_hub import ModelCard

    card = ModelCard.load(tmp_path / "adapter" / "README.md").data
    assert (card.base_model, card.library_name) == (None, "peft")  # the Hub takes no paths
    (tmp_path / "adapter" / "README.md").write_text("my own words")
    flm.peft.save_adapter(model, tmp_path / "adapter")
    assert (tmp_path / "adapter" / "README.md").read_text() == "my own words"


def test_names_that_transformers_opens(tmp_path: Path) -> None:
    from functional_llm.presets.sources import transformers_name

    assert transformers_name("hf://org/name@main") == ("org/name", "main")
    assert transformers_name("qwen3_0.6b") == ("Qwen/Qwen3-0.6B", "main")
    smollm2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert transformers_name("smollm2_135m_instruct") == (smollm2, None)
    assert transformers_name(str(tmp_path)) == (str(tmp_path), None)
    assert transformers_name(str(tmp_path / "x.gguf")) == (None, None)


@pytest.mark.parametrize("one", ["llama_grouped"], indirect=True)
def test_singular_values_of_another_base(one: Any, tmp_path: Path) -> None:
    model = flm.peft.svf(one.backbone)
    for variable in model.trainable_variables:
        variable.assign_add(np.random.default_rng(0).normal(size=variable.shape) * 0.1)
    flm.peft.save_adapter(model, tmp_path)
    flm.peft.load_adapter(one.backbone, tmp_path)
    other = flm.Backbone.from_preset(one.folder)
    value = next(v for v in other.variables if v.path == "decoder_1/attention/value/kernel")
    value.assign(value * 1.01)
    with pytest.raises(ValueError, match="(?s)1 differences.*decoder_1/attention/value: the singu"):
        flm.peft.load_adapter(other, tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    name = "decoder_0/attention/query/fingerprint"
    turned = {**tensors, name: tensors[name][:, ::-1].copy()}
    for changed, message in (
        (turned, "are not those that z was trained for"),
        ({k: x for k, x in tensors.items() if k != name}, "missing weight"),
        ({**tensors, name: tensors[name][:, 1:].copy()}, "of shape"),
    ):
        save_file(changed, path)
        with pytest.raises(ValueError, match=message):
            flm.peft.load_adapter(one.backbone, tmp_path)
    save_file({k: x for k, x in tensors.items() if not k.endswith("fingerprint")}, path)
    with pytest.warns(UserWarning, match="does not say which weights it was trained on"):
        flm.peft.load_adapter(one.backbone, tmp_path)


def test_directions_are_kept_and_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from functional_llm.peft import decomposition

    monkeypatch.setenv("FUNCTIONAL_LLM_CACHE", str(tmp_path))
    matrix = np.random.default_rng(0).normal(size=(300, 260)).astype("float32")
    first = decomposition.singular_directions(matrix)
    (kept,) = (tmp_path / "singular_directions").iterdir()
    monkeypatch.setattr(np.linalg, "svd", lambda *args, **kwargs: pytest.fail("computed again"))
    np.testing.assert_array_equal(decomposition.singular_directions(matrix), first)
    monkeypatch.undo()
    monkeypatch.setenv("FUNCTIONAL_LLM_CACHE", str(tmp_path))
    kept.write_bytes(b"damaged")
    np.testing.assert_array_equal(decomposition.singular_directions(matrix), first)
    np.testing.assert_allclose(matrix @ first.T @ first, matrix, atol=1e-3)


@pytest.mark.parametrize("one", ["llama_multi_head_tied"], indirect=True)
def test_a_merged_head_of_its_own_does_not_fit_a_tied_config(one: Any) -> None:
    """It is known from the layers, before they are trained: finetune.py asks then."""
    merged = flm.peft.merge(flm.peft.lora(one.backbone, targets=["token_embedding"]), keep=False)
    with pytest.raises(ValueError, match="(?s)reverse_embeddings.*a head of its own beside a tied"):
        merged.check_preset()
    flm.peft.merge(flm.peft.lora(one.backbone, targets=["query"]), keep=False).check_preset()


def test_a_number_names_no_module() -> None:
    """PEFT would take decoder layers for it, whose names end in a number, too."""
    known = {"model.altup_projections.0", "model.altup_projections.1", "model.layers.0.mlp.up"}
    streams = {name for name in known if "altup" in name}
    assert target_modules(known, known) == [*sorted(streams), "up"]


def test_a_scale_of_one_number_is_of_what_the_config_says() -> None:
    config, one = {"feedforward_modules": ["down"]}, {"ia3_l": np.ones((1, 1), "float32")}
    for module, is_of_inputs in (("layers.0.shared_gate", False), ("layers.0.down", True)):
        assert _read_ia3(config, module, one).options == {"scales_inputs": is_of_inputs}
