"""LoRA on experts through PEFT's files of several versions, both ways, with equal logits."""

import json
import re
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

import functional_llm as flm
from configs import CONFIGS
from nightly import FAMILIES_AND_KINDS, one_of_each_layout
from reference import make_reference, reference_logits

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    theirs = pytest.importorskip("peft")

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    # PEFT's patterns count for parameters, and it says that they do not.
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning"),
]

NAME = "qwen3_moe_some_dense"  # 6 experts in layer 0, one MLP in layer 1
IDS = np.random.default_rng(0).integers(0, 60, (2, 7)).astype("int32")
PREFIX = "base_model.model.model.layers"
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
ROUTER = "mlp.gate.weight"


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("experts")
    make_reference(CONFIGS[NAME]).save_pretrained(folder)
    backbone = flm.Backbone.from_preset(folder)
    return SimpleNamespace(backbone=backbone, base=np.asarray(backbone(IDS)))


def _adapted(folder: Path, name: str = NAME, **options: Any) -> np.ndarray:
    """Saves a PEFT adapter with random weights; returns its logits."""
    options = {"r": 2, "lora_alpha": 5, **options}
    config = theirs.LoraConfig(**options)
    model = theirs.get_peft_model(make_reference(CONFIGS[name]), config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    model.save_pretrained(folder)
    return reference_logits(model, IDS)


def _of_peft(folder: Path, name: str = NAME) -> np.ndarray:
    model = theirs.PeftModel.from_pretrained(make_reference(CONFIGS[name]), str(folder)).eval()
    return reference_logits(model, IDS)


def _moved(model: Any) -> Any:
    rng = np.random.default_rng(2)
    for variable in model.trainable_variables:
        variable.assign_add(rng.normal(size=variable.shape).astype("float32") * 0.1)
    return model


def _changed(folder: Path, change: Any, **keys: Any) -> None:
    """Rewrites an adapter: `change` returns its tensors, `keys` go into its config."""
    weights, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    tensors = {name: np.ascontiguousarray(x) for name, x in change(load_file(weights)).items()}
    save_file(tensors, weights, {"format": "pt"})
    config.write_text(json.dumps(json.loads(config.read_text()) | keys))


@pytest.mark.parametrize(
    "options",
    [
        {"target_parameters": [*EXPERTS, ROUTER], "target_modules": ["q_proj"]},
        {
            "target_parameters": ["mlp.experts.down_proj", "model.layers.1.mlp.up_proj.weight"],
            "rank_pattern": {"down_proj": 1, "up_proj.weight": 3},
            "alpha_pattern": {"experts.down_proj": 9},
            "use_rslora": True,
        },
        # PEFT takes it for the experts alone, not for the MLP of layer 1.
        {"target_modules": ["o_proj", "gate_proj", "up_proj", "down_proj"]},
    ],
)
def test_what_peft_trained_and_what_we_save_of_it(
    pair: Any, options: dict[str, Any], tmp_path: Path
) -> None:
    expected = _adapted(tmp_path / "theirs", **options)
    assert np.abs(expected - pair.base).max() > 1e-2
    ours = flm.peft.load_adapter(pair.backbone, tmp_path / "theirs")
    np.testing.assert_allclose(ours(IDS), expected, atol=1e-4)
    flm.peft.save_adapter(ours, tmp_path / "ours")
    np.testing.assert_allclose(_of_peft(tmp_path / "ours"), expected, atol=1e-4)


FAMILIES = [name for name in FAMILIES_AND_KINDS if any("experts" in key for key in CONFIGS[name])]


@one_of_each_layout
@pytest.mark.parametrize("name", FAMILIES)
def test_peft_loads_what_we_trained(name: str, tmp_path: Path) -> None:
    make_reference(CONFIGS[name]).save_pretrained(tmp_path / "base")
    backbone = flm.Backbone.from_preset(tmp_path / "base")
    ranks = {"experts_down": 3, "shared_gate": 1, "**": 2}
    ours = _moved(flm.peft.lora(backbone, ranks, 7, ["decoder_*/mlp/**"]))
    expected = np.asarray(ours(IDS))
    flm.peft.save_adapter(ours, tmp_path / "ours")
    np.testing.assert_allclose(_of_peft(tmp_path / "ours", name), expected, atol=1e-4)
    again = flm.peft.load_adapter(backbone, tmp_path / "ours")
    np.testing.assert_allclose(again(IDS), expected, atol=1e-5)
    flm.peft.save_adapter(again, tmp_path / "again")  # ranks do not add up
    names = ("adapter_model.safetensors", "adapter_config.json")
    for file in names:
        assert (tmp_path / "ours" / file).read_bytes() == (tmp_path / "again" / file).read_bytes()


def _one_by_one(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """As Transformers 4 had experts: a Linear each. PEFT's rule, the other way round."""
    random, found = np.random.default_rng(3), {}
    for name in tensors:
        if ".experts." not in name:
            found[name] = tensors[name]
    for expert in range(6):
        for part, sizes in {"gate": (48, 24), "up": (48, 24), "down": (24, 48)}.items():
            module = f"{PREFIX}.0.mlp.experts.{expert}.{part}_proj"
            a, b = (random.normal(size=x) * 0.1 for x in ((2, sizes[0]), (sizes[1], 2)))
            found[f"{module}.lora_A.weight"] = a.astype("float32")
            found[f"{module}.lora_B.weight"] = b.astype("float32")
    return found


def test_experts_that_were_a_linear_each(pair: Any, tmp_path: Path) -> None:
    _adapted(tmp_path, target_modules=["q_proj"])
    targets = ["q_proj", "gate_proj", "up_proj", "down_proj"]
    _changed(tmp_path, _one_by_one, target_modules=targets)
    expected = _of_peft(tmp_path)  # which makes parameters of them
    _changed(tmp_path, dict, target_modules=r".*(q_proj|experts\.\d\.\w+_proj)")
    ours = flm.peft.load_adapter(pair.backbone, tmp_path)
    assert np.abs(expected - pair.base).max() > 1e-2
    np.testing.assert_allclose(ours(IDS), expected, atol=1e-4)
    one_more = {f"{PREFIX}.0.mlp.experts.6.up_proj.lora_A.weight": np.zeros((2, 48), "float32")}
    _changed(tmp_path, lambda x: {k: t for k, t in x.items() if ".3.up_proj" not in k} | one_more)
    with pytest.raises(ValueError, match="does not fit") as error:
        flm.peft.load_adapter(pair.backbone, tmp_path)
    assert "experts.3.up_proj' is one of its targets, and has no tensors" in str(error.value)
    assert "experts.6.up_proj', expert 6 of layer 0" in str(error.value)


def _turned(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """As PEFT 0.17 to 0.19.0 had it: A of the parameter's second axis, B of its third."""
    found = dict(tensors)
    for name in [x for x in tensors if ".experts." in x and "lora_A" in x]:
        a, b = tensors[name], tensors[name.replace("lora_A", "lora_B")]
        a_of_each, b_of_each = (
            a.reshape(6, 2, -1),
            b.reshape(len(b), 2, 6),
        )  # (E, R, in), (out, R, E)
        found[name] = b_of_each.transpose(2, 1, 0).reshape(12, -1)
        found[name.replace("lora_A", "lora_B")] = a_of_each.transpose(2, 1, 0).reshape(-1, 12)
    return found


@pytest.mark.parametrize("version", ["0.19.0", "0.18.2.dev0@UNKNOWN", None])
def test_the_layout_of_older_versions(pair: Any, version: str | None, tmp_path: Path) -> None:
    expected = _adapted(tmp_path, target_parameters=EXPERTS)
    _changed(tmp_path, _turned, peft_version=version)
    ours = flm.peft.load_adapter(pair.backbone, tmp_path)
    np.testing.assert_allclose(ours(IDS), expected, atol=1e-4)
    _changed(tmp_path, dict, peft_version="0.21.2")
    with pytest.raises(ValueError, match=r"\(12, 24\) and \(48, 12\), received \(12, 48\) and"):
        flm.peft.load_adapter(pair.backbone, tmp_path)


def test_another_layout_of_experts_is_refused(pair: Any, tmp_path: Path) -> None:
    _adapted(tmp_path, "qwen3_moe_all_chosen", target_parameters=[EXPERTS[1]])  # 3, in layer 1
    with pytest.raises(ValueError, match="does not fit") as error:
        flm.peft.load_adapter(pair.backbone, tmp_path)
    assert "no module 'model.layers.1.mlp.experts'" in str(error.value)
    assert "'model.layers.0.mlp.experts.down_proj' has no tensor" in str(error.value)
    _changed(tmp_path, lambda x: {k.replace(".1.mlp", ".0.mlp"): t for k, t in x.items()})
    words = "6 experts of rank 2, of shapes (12, 24) and (48, 12), received (6, 24) and (48, 6)"
    with pytest.raises(ValueError, match=re.escape(words)):
        flm.peft.load_adapter(pair.backbone, tmp_path)
    _changed(tmp_path, dict, use_dora=True)
    with pytest.raises(ValueError, match="expected plain LoRA, received use_dora"):
        flm.peft.load_adapter(pair.backbone, tmp_path)


def test_what_peft_has_not_is_kept_by_paths(pair: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a matrix for each expert, which DoRA does not know"):
        flm.peft.dora(pair.backbone, 2, targets=["experts_*"])
    with pytest.warns(UserWarning, match=r"lora_dropout is 0 in the file, and 0\.1 here"):
        lora = flm.peft.lora(pair.backbone, 2, targets=["experts_up"], dropout=0.1)
        flm.peft.save_adapter(lora, tmp_path / "lora")
    ours = _moved(flm.peft.dora(pair.backbone, 2, targets=["router", "decoder_1/mlp/*"]))
    flm.peft.save_adapter(ours, tmp_path / "dora")
    again = flm.peft.load_adapter(pair.backbone, tmp_path / "dora")
    np.testing.assert_array_equal(again(IDS), ours(IDS))
