"""The pages under docs/ run as they stand; only the model they load is a tiny one."""

import re
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

import functional_llm as flm
from configs import CONFIGS
from functional_llm.stock import lowering
from reference import save_reference
from tiny import save_tiny, save_tokenizer

IDS = np.random.default_rng(0).integers(3, 250, (2, 7)).astype("int32")
SMOLLM2 = "smollm2_135m_instruct"


def blocks(page: Path) -> list[str]:
    """Returns the Python code of a page."""
    return re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


def run(code: list[str], folder: Path, names: dict[str, Any]) -> dict[str, Any]:
    for block in code:
        exec(compile(block.replace(SMOLLM2, str(folder)), "docs", "exec"), names)
    return names


def lines_of(block: str) -> int:
    return len([line for line in block.splitlines() if line.strip()])


def logits_of(model: Any) -> np.ndarray:
    return np.asarray(model(IDS))


def move(model: Any) -> None:
    rng = np.random.default_rng(1)
    for variable in model.trainable_variables:
        variable.assign_add(rng.normal(size=variable.shape).astype("float32") * 0.1)


@pytest.mark.parametrize("name", ["LoRADense", "SVFDense"])
def test_recipes_in_stock_files(
    repository: Path, folder: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As docs/stock_files.md says: their `call` is their lowering."""
    code = blocks(repository / "docs" / "rewiring.md")
    begin = next(i for i, block in enumerate(code) if f"class {name}" in block)
    names = run([*code[:1], *code[begin : begin + 2]], folder, {})
    model = names["lora_backbone" if name == "LoRADense" else "svf_backbone"]
    move(model)
    monkeypatch.setattr(lowering, "_LOWERINGS", dict(lowering._LOWERINGS))
    flm.register_lowering(names[name], names[name].call)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(logits_of(loaded), logits_of(model), atol=1e-5)
    assert len(loaded.trainable_variables) == len(model.trainable_variables)


@pytest.mark.parametrize(
    ("name", "limits"), [("LoRADense", (18, 7, 10)), ("SVFDense", (17, 7, 12))]
)
def test_recipes(repository: Path, folder: Path, name: str, limits: tuple[int, ...]) -> None:
    code = blocks(repository / "docs" / "rewiring.md")
    begin = next(i for i, block in enumerate(code) if f"class {name}" in block)
    layer, patch, fold = code[begin : begin + 3]
    for block, limit in zip((layer, patch, fold), limits, strict=True):
        assert lines_of(block) <= limit
    names = run([*code[:1], layer, patch], folder, {})
    backbone = names["backbone"]
    model = names["lora_backbone" if name == "LoRADense" else "svf_backbone"]
    base = logits_of(backbone)
    np.testing.assert_allclose(logits_of(model), base, atol=1e-5)
    parts = {v.path.rpartition("/")[2] for v in model.trainable_variables}
    assert parts == ({"a", "b"} if name == "LoRADense" else {"z"})
    move(model)
    moved = logits_of(model)
    assert np.abs(moved - base).max() > 1e-2
    merged = run([fold], folder, names)["merged"]
    np.testing.assert_allclose(logits_of(merged), moved, atol=1e-4)
    np.testing.assert_array_equal(logits_of(backbone), base)
    assert {type(x) for _, x in flm.walk(merged)} == {type(x) for _, x in flm.walk(backbone)}
    ids = [IDS[0].tolist()]
    written = flm.TextGenerator(model).generate_ids(ids, 8)
    assert written == flm.TextGenerator(merged).generate_ids(ids, 8)


def test_rewiring_page(repository: Path, folder: Path) -> None:
    names = run(blocks(repository / "docs" / "rewiring.md"), folder, {})
    assert list(names["queries"]) == ["decoder_0/attention/query", "decoder_1/attention/query"]
    assert set(names["queries"]) < set(names["dense"])
    fused, backbone = names["fused"], names["backbone"]
    assert type(fused) is flm.Backbone
    assert fused.count_params() == backbone.count_params()
    np.testing.assert_allclose(logits_of(fused), logits_of(backbone), atol=1e-4)
    paths = {path.rpartition("/")[2] for path in flm.select(fused, "decoder_*/attention/*")}
    assert "query_key_value" in paths and not {"query", "key", "value"} & paths
    ids = [IDS[0].tolist()]
    written, expected = (flm.TextGenerator(x).generate_ids(ids, 8) for x in (fused, backbone))
    assert written == expected


def test_peft_page(
    repository: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names = run(blocks(repository / "docs" / "peft.md"), folder, {})
    base = logits_of(names["backbone"])
    models = [names[x] for x in ("lora_backbone", "wide", "mixed", "pissa", "biases", "adapted")]
    own = [names[x] for x in ("mine", "merged_mine", "by_pattern", "by_function")]
    for model in (*models, *names["others"], *own, names["merged"]):
        np.testing.assert_allclose(logits_of(model), base, atol=1e-5)
    strengths = {
        path.rpartition("/")[2]: layer.strength
        for path, layer in flm.select(names["by_function"], flm.peft.Adapter).items()
    }
    assert strengths == {"gate": 0.5, "up": 2.0, "down": 0.5}
    move(names["mine"])
    flm.peft.save_adapter(names["mine"], "row_scale")
    loaded = flm.peft.load_adapter(names["backbone"], "row_scale")
    np.testing.assert_allclose(logits_of(loaded), logits_of(names["mine"]), atol=1e-5)
    assert np.abs(logits_of(loaded) - base).max() > 1e-2


def test_quantizing_page(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    size = save_tokenizer(tmp_path)
    wide = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": size}
    save_reference({**CONFIGS["llama_grouped"], **wide}, tmp_path)
    names = run(blocks(repository / "docs" / "quantizing.md"), tmp_path, {})
    base = logits_of(names["backbone"])
    for name, most in (("small", 0.05), ("smaller", 0.3)):
        error = np.abs(logits_of(names[name]) - base).mean()
        assert 0 < error < most * base.std()
    np.testing.assert_array_equal(logits_of(names["smaller"]), logits_of(names["loaded"]))
    losses = names["history"].history["loss"]
    assert losses[-1] < losses[0]
    again = flm.peft.load_adapter(names["backbone"], tmp_path / "adapter")
    assert np.abs(logits_of(again) - base).max() > 0


def test_activations_page(repository: Path, folder: Path) -> None:
    code = blocks(repository / "docs" / "activations.md")
    names = run(code, folder, {})
    lens = next(block for block in code if "def logit_lens" in block)
    assert lines_of(lens) <= 15
    assert list(names["lens"]) == ["decoder_0", "decoder_1"]
    ids = np.array([names["tokenizer"].encode("The capital of France is")])
    last = int(np.asarray(names["backbone"](ids))[0, -1].argmax())
    assert names["lens"]["decoder_1"] == names["tokenizer"].decode([last])
    assert names["before"] != names["after"]


@pytest.mark.real
@pytest.mark.nightly  # by day, a tiny model
def test_activations_page_with_smollm2(repository: Path, smollm2_gguf: Path) -> None:
    names = run(blocks(repository / "docs" / "activations.md"), smollm2_gguf, {})
    assert names["lens"][names["last"]] == " Paris"
    sea = ("sea", "ocean", "Ocean")
    assert not any(word in names["before"] for word in sea)
    assert any(word in names["after"] for word in sea)


def test_the_page_on_attention(
    repository: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = run(blocks(repository / "docs" / "attention.md"), folder, {})
    assert "1 x 4096 tokens, " in capsys.readouterr().out
    plain, encoder = logits_of(names["backbone"]), logits_of(names["encoder"])
    np.testing.assert_allclose(logits_of(names["in_blocks_backbone"]), plain, atol=2e-5)
    assert np.abs(encoder - plain)[:, 0].max() > 1e-3  # the first token sees what follows
    allowed = names["backbone"]({"token_ids": names["ids"], "mask": np.ones((1, 4, 4), bool)})
    changed = np.abs(np.asarray(allowed) - np.asarray(names["logits"])).max(axis=(0, 2))
    assert changed[3] > 1e-4 and changed[:3].max() < 1e-5


def test_scoring_page(
    repository: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names = run(blocks(repository / "docs" / "scoring.md"), folder, {})
    logs = [score.log_probability for score in (names["paris"], names["london"])]
    assert all(log < 0 for log in logs) and logs[0] != logs[1]
    assert names["from_ids"].log_probability == pytest.approx(logs[0], abs=1e-4)
    assert names["strided"].num_tokens < names["found"].num_tokens
    assert names["evaluation"].summary["acc"] in (0, 0.5, 1)
