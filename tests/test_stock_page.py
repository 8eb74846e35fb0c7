"""docs/stock_files.md runs as it stands: ours here, the rest where this library is not."""

import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import functional_llm as flm
from stock import BACKENDS, run_stock
from tiny import save_tiny

PAGE = Path(__file__).resolve().parents[1] / "docs" / "stock_files.md"
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
OURS = [block for block in BLOCKS if re.search(r"\b(flm|backbone)\b", block)]
STOCK = [block for block in BLOCKS if block not in OURS]
PROMPTS = [[504, 3575, 282, 4649, 314], [19556, 28]]  # as on the page
SHOW = "print('ids', new_ids.tolist())\nprint('loss', history.history['loss'])\n"


def run_ours(blocks: list[str], handle: str, folder: Path, names: dict[str, Any]) -> None:
    before = Path.cwd()
    os.chdir(folder)
    try:
        for block in blocks:
            exec(compile(block.replace("smollm2_135m_instruct", handle), PAGE.name, "exec"), names)
    finally:
        os.chdir(before)


def run_theirs(backend: str, folder: Path) -> tuple[list[list[int]], list[float]]:
    """Returns the new ids of the page's loop, and the losses of its LoRA."""
    output = run_stock(backend, "-c", "\n".join([*STOCK, SHOW]), folder=folder)
    found = {key: re.search(rf"^{key} (.*)$", output, re.M) for key in ("ids", "loss")}
    ids, losses = (eval(match[1]) for match in found.values() if match is not None)
    return ids, losses


def test_the_loop_is_short() -> None:
    (loop,) = (block for block in STOCK if "def generate" in block)
    imports = re.findall(r"^(?:import|from) .*", STOCK[0], re.M)
    assert len([line for line in loop.splitlines() if line.strip()]) + len(imports) - 1 <= 25
    assert all("functional_llm" not in block for block in STOCK)


@pytest.mark.parametrize(
    "backend", [x if x == "torch" else pytest.param(x, marks=pytest.mark.nightly) for x in BACKENDS]
)
def test_the_page_runs(tmp_path: Path, backend: str) -> None:
    tiny = str(save_tiny(tmp_path / "tiny", vocabulary_size=49152))
    names: dict[str, Any] = {}
    run_ours(OURS[:1] + [block for block in OURS if "stablehlo" in block], tiny, tmp_path, names)
    ids, losses = run_theirs(backend, tmp_path)
    generator = flm.TextGenerator(names["backbone"])
    assert ids == generator.generate_ids(PROMPTS, max_new_tokens=32)
    assert losses[-1] < losses[0]
    run_ours(OURS[1:], tiny, tmp_path, names)  # the way back, the trained file too
    assert type(names["backbone"]) is flm.Backbone
    assert names["tokenizer"].encode("fox") == flm.Tokenizer.from_preset(tiny).encode("fox")


@pytest.mark.real
@pytest.mark.nightly  # by day, tiny models do
@pytest.mark.parametrize("backend", ["jax", "tensorflow"])
def test_smollm2_writes_the_same(smollm2_gguf: Path, tmp_path: Path, backend: str) -> None:
    names: dict[str, Any] = {}
    run_ours(OURS[:1], str(smollm2_gguf), tmp_path, names)
    (loop,) = (block for block in STOCK if "def generate" in block)
    assert "max_new_tokens=32)" in loop
    fewer = loop.replace("max_new_tokens=32)", "max_new_tokens=12)")  # a second each
    code = "\n".join([STOCK[0], fewer, "print('ids', new_ids.tolist())"])
    output = run_stock(backend, "-c", code, folder=tmp_path)
    generator = flm.TextGenerator(names["backbone"])
    expected = generator.generate_ids(PROMPTS, max_new_tokens=12)
    assert f"ids {expected}" in output


RUNTIMES = {
    "onnx": """
import onnxruntime
session = onnxruntime.InferenceSession(path)
(logits,) = session.run(None, {session.get_inputs()[0].name: token_ids})
""",
    "openvino": """
import openvino
options = {"INFERENCE_PRECISION_HINT": "f32"}
compiled = openvino.Core().compile_model(path, "CPU", options)
logits = compiled(token_ids)[0]
""",
    "tf_saved_model": """
import tensorflow
loaded = tensorflow.saved_model.load(path)
logits = loaded.serve(token_ids).numpy()
""",
}


@pytest.mark.parametrize(
    "format", ["onnx", pytest.param("openvino", marks=pytest.mark.nightly), "tf_saved_model"]
)
def test_other_runtimes(tmp_path: Path, format: str) -> None:
    """What TensorFlow's Keras exports from a stock file runs without any Keras."""
    backbone = flm.Backbone.from_preset(save_tiny(tmp_path / "tiny"))
    backbone.save(tmp_path / "model.keras")
    token_ids = np.random.default_rng(0).integers(0, 250, (3, 9)).astype("int32")
    np.savez(tmp_path / "case.npz", token_ids=token_ids, logits=np.asarray(backbone(token_ids)))
    path = {"onnx": "model.onnx", "openvino": "model.xml"}.get(format, "model")
    code = f"""
import keras
import numpy as np
model = keras.saving.load_model("model.keras")
with np.load("case.npz") as case:
    token_ids, expected = case["token_ids"], case["logits"]
model(token_ids[:1, :2])
path = "{path}"
model.export(path, format="{format}", verbose=False)
{RUNTIMES[format]}
print("difference", float(np.abs(logits - expected).max()))
"""
    output = run_stock("tensorflow", "-c", code, folder=tmp_path)
    found = re.search(r"difference (\S+)", output)
    assert found is not None
    assert float(found[1]) < 1e-4
