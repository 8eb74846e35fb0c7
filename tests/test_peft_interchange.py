"""Adapters through PEFT's own files, both ways, with equal logits."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

import functional_llm as flm
from configs import CONFIGS, ONE_OF_EACH_FAMILY
from functional_llm.backbones.families import FAMILIES
from functional_llm.backbones.wrapper import with_other_prefix
from nightly import (
    FAMILIES_AND_KINDS,
    one_of_each_kind,
    one_of_each_layout_without_experts,
)
from reference import make_reference, reference_logits

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    theirs = pytest.importorskip("peft")

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    # PEFT's patterns count for parameters, and it says that they do not.
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning"),
]

IDS = np.random.default_rng(0).integers(0, 128, (2, 7)).astype("int32")
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module", params=["llama_biases"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp(request.param)
    make_reference(CONFIGS[request.param]).save_pretrained(folder)
    return SimpleNamespace(
        make=lambda: make_reference(CONFIGS[request.param]),
        backbone=flm.Backbone.from_preset(str(folder)),
        base=np.asarray(flm.Backbone.from_preset(str(folder))(IDS)),
    )


# A tensor for each layer; fused ones, which lie as Conv1D has them; ones that are fused by head.
EVERY_METHOD = ["llama_grouped", "gpt2_tied", "gpt_neox_five_heads"]


# Family -> linear layers that PEFT is not to adapt: those of states it refuses, or Transformers
# does not compute their adapters; "all-linear" takes places in a list of them for decoder layers,
# too; routers return several results.
LEFT_OUT = {
    "mamba": ["out_proj", "dt_proj"],
    "mamba2": ["out_proj"],
    "falcon_h1": ["out_proj"],
    "nemotron_h": ["out_proj"],
    "gemma3n_text": ["0", "1", "2"],
    "llama4_text": ["router"],
    "phimoe": ["router"],
}


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")
@one_of_each_layout_without_experts
@pytest.mark.parametrize("name", FAMILIES_AND_KINDS)
def test_every_family_both_ways(name: str, tmp_path: Path) -> None:
    make_reference(CONFIGS[name]).save_pretrained(tmp_path)
    backbone = flm.Backbone.from_preset(str(tmp_path))
    base = np.asarray(backbone(IDS))
    options: dict[str, Any] = {"r": 3, "lora_alpha": 5, "target_modules": "all-linear"}
    options["exclude_modules"] = LEFT_OUT.get(CONFIGS[name]["model_type"])
    targets: Any = "all"
    if "out_proj" in (LEFT_OUT.get(CONFIGS[name]["model_type"]) or ()):
        targets = "input" if "mamba" in name else ["input", "up"]
    last = ["down_proj", "c_fc", "mlp.c_proj", "dense_4h_to_h"]  # of one family or another
    configs = [
        theirs.LoraConfig(**options),
        theirs.IA3Config(
            target_modules="all-linear",
            feedforward_modules=last,
            exclude_modules=options["exclude_modules"],
        ),
        theirs.LoraConfig(**options, use_dora=True),
    ]
    for i, config in enumerate(configs if name in EVERY_METHOD else configs[:2]):
        model = theirs.get_peft_model(make_reference(CONFIGS[name]), config).eval()
        _noise(model)
        model.save_pretrained(tmp_path / str(i))
        ours = flm.peft.load_adapter(backbone, tmp_path / str(i))
        expected = reference_logits(model, IDS)
        assert np.abs(expected - base).max() > 1e-2
        np.testing.assert_allclose(np.asarray(ours(IDS)), expected, atol=1e-4)
    rng = np.random.default_rng(2)
    methods: list[Callable[[], Any]] = [
        lambda: flm.peft.lora(backbone, 2, 7, targets=targets, init="pissa"),
        lambda: flm.peft.ia3(backbone),
        lambda: flm.peft.lora(backbone, {"query": 3, "value": 2}, rslora=True),
        lambda: flm.peft.dora(backbone, 2, {"value": 3, "**": 5}, targets=["value", "down"]),
    ]
    for i, method in enumerate(methods if name in EVERY_METHOD else methods[:2]):
        ours = method()
        for variable in ours.trainable_variables:
            variable.assign_add(rng.normal(size=variable.shape).astype("float32") * 0.1)
        expected = np.asarray(ours(IDS))
        flm.peft.save_adapter(ours, tmp_path / f"ours_{i}")
        reference = make_reference(CONFIGS[name])
        model = theirs.PeftModel.from_pretrained(reference, str(tmp_path / f"ours_{i}")).eval()
        np.testing.assert_allclose(reference_logits(model, IDS), expected, atol=1e-4)
        again = flm.peft.load_adapter(backbone, tmp_path / f"ours_{i}")
        np.testing.assert_allclose(np.asarray(again(IDS)), expected, atol=1e-4)


@pytest.mark.parametrize("mode", ["int8", "int4/4"])
def test_an_adapter_trained_on_integers_is_one_for_the_model_in_floats(
    pair: Any, mode: str, tmp_path: Path
) -> None:
    ours = flm.peft.lora(flm.quantize(pair.backbone, mode), 2, 7, targets="all", seed=0)
    ours.compile("adamw")
    ours.fit(IDS[:, :-1], IDS[:, 1:], epochs=2, verbose=0)
    flm.peft.save_adapter(ours, tmp_path)
    model = theirs.PeftModel.from_pretrained(pair.make(), str(tmp_path)).eval()
    expected = reference_logits(model, IDS)
    in_floats = flm.peft.load_adapter(pair.backbone, tmp_path)
    np.testing.assert_allclose(np.asarray(in_floats(IDS)), expected, atol=1e-5)
    assert np.abs(expected - pair.base).max() > 1e-2
    difference = np.abs(np.asarray(ours(IDS)) - expected)  # what the integers make of the base
    assert 0 < difference.mean() < 0.2 * expected.std()


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")
@one_of_each_kind
@pytest.mark.parametrize("name", ONE_OF_EACH_FAMILY)
def test_names_of_every_family(name: str, tmp_path: Path) -> None:
    """What PEFT calls the modules, adapted ones, whole ones and biases, both ways.

    The weights are compared, with adapters folded in: no program is compiled for it.
    """
    reference = make_reference(CONFIGS[name])
    reference.save_pretrained(tmp_path)
    modules = reference.named_modules()
    norms = sorted({x.rpartition(".")[2] for x, m in modules if "Norm" in type(m).__name__})
    if has_heads_norm := "g_norm" in norms:  # which no layer alone is: see below
        norms = ["attn_norm", "ffn_norm", "pre_norm"]
    config = theirs.LoraConfig(
        r=2,
        lora_alpha=5,
        target_modules="all-linear",
        exclude_modules=LEFT_OUT.get(CONFIGS[name]["model_type"]),
        modules_to_save=norms,
        bias="none" if has_heads_norm else "all",
    )
    model = theirs.get_peft_model(reference, config)
    _noise(model)
    model.save_pretrained(tmp_path / "theirs")
    ours = flm.peft.load_adapter(flm.Backbone.from_preset(tmp_path), tmp_path / "theirs")
    flm.peft.save_adapter(ours, tmp_path / "ours")
    flm.peft.merge(ours).save_preset(tmp_path / "folded")
    stored = FAMILIES[CONFIGS[name]["model_type"]].stored_prefixes
    opened = type(reference).from_pretrained(tmp_path / "folded", dtype="float32")
    received = {name: x.numpy() for name, x in opened.state_dict().items()}
    received = {with_other_prefix(name, stored): value for name, value in received.items()}
    again = theirs.PeftModel.from_pretrained(make_reference(CONFIGS[name]), str(tmp_path / "ours"))
    for folded in (model.merge_and_unload(), again.merge_and_unload()):
        expected = {name: x.detach().numpy() for name, x in folded.state_dict().items()}
        assert {*expected} == {*received}
        for key, array in received.items():
            np.testing.assert_allclose(array, expected[key], atol=1e-5, err_msg=key)


def test_a_norm_of_each_head_is_not_retrained(tmp_path: Path) -> None:
    """Its weight is within a layer, of which an adapter could not take the place."""
    reference = make_reference(CONFIGS["cohere_query_key_norm_untied"])
    reference.save_pretrained(tmp_path)
    config = theirs.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["k_norm"])
    theirs.get_peft_model(reference, config).save_pretrained(tmp_path / "theirs")
    with pytest.raises(ValueError, match="received decoder_0/attention/key_norm/scale, which is"):
        flm.peft.load_adapter(flm.Backbone.from_preset(tmp_path), tmp_path / "theirs")


def _noise(model: Any) -> None:
    """Moves every weight that trains, so that a wrong one shows."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


def _peft_configs() -> dict[str, Any]:
    lora: dict[str, Any] = {"r": 3, "lora_alpha": 5}
    return {
        "lora": theirs.LoraConfig(**lora, target_modules=["q_proj", "v_proj"]),
        "all_linear": theirs.LoraConfig(**lora, target_modules="all-linear", lora_dropout=0.1),
        "head": theirs.LoraConfig(**lora, target_modules=["up_proj", "lm_head"]),
        "patterns": theirs.LoraConfig(
            **lora,
            target_modules=ALL,
            rank_pattern={"v_proj": 2, "layers.1.mlp.up_proj": 4},
            alpha_pattern={"q_proj": 1, "^model.layers.0.mlp.down_proj": 9},
        ),
        "some_layers": theirs.LoraConfig(
            **lora, target_modules=["o_proj"], layers_to_transform=[1]
        ),
        "rslora": theirs.LoraConfig(**lora, target_modules=ALL, use_rslora=True),
        "dora": theirs.LoraConfig(**lora, target_modules=ALL, use_dora=True),
        "rsdora": theirs.LoraConfig(
            **lora, target_modules=["q_proj"], use_dora=True, use_rslora=True
        ),
        "ia3": theirs.IA3Config(
            target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]
        ),
        "ia3_no_feedforward": theirs.IA3Config(
            target_modules=["o_proj", "up_proj"], feedforward_modules=[]
        ),
    }


@pytest.mark.parametrize("name", list(_peft_configs()))
def test_we_load_what_peft_saved(pair: Any, name: str, tmp_path: Path) -> None:
    config = _peft_configs()[name]
    model = theirs.get_peft_model(pair.make(), config).eval()
    _noise(model)
    model.save_pretrained(tmp_path, save_embedding_layers=False)  # True adds the head itself
    expected = reference_logits(model, IDS)
    assert np.abs(expected - pair.base).max() > 1e-2
    ours = flm.peft.load_adapter(pair.backbone, tmp_path)
    np.testing.assert_allclose(np.asarray(ours(IDS)), expected, atol=1e-4)
    np.testing.assert_array_equal(np.asarray(pair.backbone(IDS)), pair.base)
    merged = np.asarray(flm.peft.merge(ours)(IDS))
    np.testing.assert_allclose(merged, reference_logits(model.merge_and_unload(), IDS), atol=1e-4)


def _our_models(backbone: Any) -> dict[str, Any]:
    linear = ["decoder_*/attention/*", "decoder_*/mlp/*"]
    peft = flm.peft
    return {
        "lora": lambda: peft.lora(backbone, rank=3, alpha=5),
        "all": lambda: peft.lora(backbone, rank=3, alpha=5, targets="all", dropout=0.2),
        "patterns": lambda: peft.lora(
            backbone,
            rank={"decoder_0/attention/query": 2, "query": 4, "mlp/**": 3, "**/down": 1},
            alpha={"down": 2, "**": 7},
        ),
        "some": lambda: peft.lora(backbone, 2, 3, targets=["decoder_1/mlp/up", "key"]),
        "rslora": lambda: peft.lora(backbone, 4, 3, targets=linear, rslora=True),
        "pissa": lambda: peft.lora(backbone, 4, 3, targets=["query", "down"], init="pissa"),
        "rspissa": lambda: peft.lora(backbone, 4, 3, ["up"], rslora=True, init="pissa"),
        "dora": lambda: peft.dora(backbone, 3, 5, targets="all"),
        "ia3": lambda: peft.ia3(backbone),
        "ia3_some": lambda: peft.ia3(backbone, ["query", "decoder_1/mlp/*"], "decoder_1/mlp/down"),
    }


@pytest.mark.parametrize("name", list(_our_models(None)))
def test_peft_loads_what_we_saved(pair: Any, name: str, tmp_path: Path) -> None:
    ours = _our_models(pair.backbone)[name]
    if name == "patterns":
        with pytest.raises(ValueError, match=r"matches 'mlp/\*\*'"):
            ours()
        options: dict[str, Any] = {"rank": {"decoder_0/**": 2, "query": 4, "down": 1}}
        model = flm.peft.lora(
            pair.backbone, **options, alpha={"down": 2, "**": 7}, targets=["query", "down"]
        )
    else:
        model = ours()
    np.testing.assert_allclose(np.asarray(model(IDS)), pair.base, atol=1e-5)
    rng = np.random.default_rng(2)
    for variable in model.trainable_variables:
        variable.assign_add(rng.normal(size=variable.shape).astype("float32") * 0.1)
    expected = np.asarray(model(IDS))
    assert np.abs(expected - pair.base).max() > 1e-2
    flm.peft.save_adapter(model, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "generation_config.json",  # has the tokenizer's stops
    ]
    # PEFT warns, which is an error here, about missing and unexpected tensors.
    reference = theirs.PeftModel.from_pretrained(pair.make(), str(tmp_path)).eval()
    np.testing.assert_allclose(reference_logits(reference, IDS), expected, atol=1e-4)
    again = flm.peft.load_adapter(pair.backbone, tmp_path)
    np.testing.assert_allclose(np.asarray(again(IDS)), expected, atol=1e-5)


def test_pissa_that_peft_saved_beside_its_residual(pair: Any, tmp_path: Path) -> None:
    config = theirs.LoraConfig(
        r=3, lora_alpha=6, target_modules=["q_proj", "down_proj"], init_lora_weights="pissa"
    )
    model = theirs.get_peft_model(pair.make(), config).eval()
    _noise(model)
    model.save_pretrained(tmp_path)
    ours = flm.peft.load_adapter(pair.backbone, tmp_path)
    np.testing.assert_allclose(np.asarray(ours(IDS)), reference_logits(model, IDS), atol=1e-4)


def test_gradients_equal_pefts(pair: Any, tmp_path: Path) -> None:
    import jax

    for name in ("all_linear", "dora", "ia3"):
        config = _peft_configs()[name]
        if name == "all_linear":
            config.lora_dropout = 0.0
        model = theirs.get_peft_model(pair.make(), config).eval()
        _noise(model)
        model.save_pretrained(tmp_path / name)
        logits = model(torch.tensor(IDS)).logits
        (logits.log_softmax(-1)[..., 0].mean()).backward()
        ours = flm.peft.load_adapter(pair.backbone, tmp_path / name)
        fixed = [v.value for v in ours.non_trainable_variables]

        def loss(values: Any, ours: Any = ours, fixed: Any = fixed) -> Any:
            logits, _ = ours.stateless_call(values, fixed, IDS)
            return jax.nn.log_softmax(logits)[..., 0].mean()

        values = [v.value for v in ours.trainable_variables]
        gradients = jax.jit(jax.grad(loss))(values)
        expected = {
            key.replace(".default", ""): p.grad.numpy()
            for key, p in model.named_parameters()
            if p.grad is not None
        }
        assert len(expected) == len(gradients)
        names = pair.backbone.module_names
        ends = {
            "lora_a": "lora_A.weight",
            "lora_b": "lora_B.weight",
            "magnitude": "lora_magnitude_vector.weight",
            "scale": "ia3_l",
        }
        for variable, gradient in zip(ours.trainable_variables, gradients, strict=True):
            path, _, own = variable.path.rpartition("/")
            other = expected[f"base_model.model.{names[path]}.{ends[own]}"]
            gradient = np.asarray(gradient)
            other = other.T if gradient.ndim == 2 else other.reshape(-1)
            np.testing.assert_allclose(gradient, other, atol=1e-5, err_msg=variable.path)


def test_a_part_of_an_adapter_is_an_error(pair: Any, tmp_path: Path) -> None:
    targets = {"target_modules": ["q_proj", "v_proj"]}
    configs = [
        theirs.LoraConfig(**targets),
        theirs.LoraConfig(target_modules=r".*layers\.1\..*(q|v)_proj"),
        theirs.LoraConfig(**targets, exclude_modules=r".*\.0\..*"),
        theirs.LoraConfig(**targets, layers_to_transform=1, layers_pattern="layers"),
        theirs.IA3Config(target_modules=["q_proj", "down_proj"], feedforward_modules="down_proj"),
    ]
    for number, config in enumerate(configs):
        folder = tmp_path / str(number)
        theirs.get_peft_model(pair.make(), config).save_pretrained(folder)
        flm.peft.load_adapter(pair.backbone, folder)
        tensors = load_file(folder / "adapter_model.safetensors")
        kept = {key: x for key, x in tensors.items() if "layers.1.self_attn.q_proj" not in key}
        assert len(kept) < len(tensors)
        save_file(kept, folder / "adapter_model.safetensors")
        with pytest.raises(
            ValueError, match="(?s)1 differences.*layers.1.self_attn.q_proj' is one of"
        ):
            flm.peft.load_adapter(pair.backbone, folder)


def _edit(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"modules_to_save": ["lm_head"]}, "'lm_head.weight' is of a module in modules_to_save"),
        ({"lora_bias": True}, "lora_bias"),
        ({"bias": "most"}, "'bias' = 'most'"),
        ({"something_new": 3}, "'something_new' = 3"),
        ({"init_lora_weights": "corda"}, "init_lora_weights = 'corda'"),
        ({"peft_type": "VERA"}, "peft_type is 'VERA'"),
        ({"r": 5}, r"decoder_0/attention/query: 'lora_a' expected shape \(48, 5\)"),
        ({"r": 0}, "rank of at least 1"),
        ({"use_dora": True}, "missing weight 'magnitude'"),
        (
            {"target_modules": ["q_proj", "v_proj", "up_proj"]},
            "(?s)2 differences.*up_proj' is one of",
        ),
    ],
)
def test_what_we_do_not_read_is_an_error(
    pair: Any, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    flm.peft.save_adapter(flm.peft.lora(pair.backbone, 3), tmp_path)
    _edit(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        flm.peft.load_adapter(pair.backbone, tmp_path)
