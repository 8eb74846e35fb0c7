"""The pages under docs/coming_from run as they stand, and both sides of them agree."""

import ast
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tiny import save_tiny

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

PAGES = Path(__file__).resolve().parents[1] / "docs" / "coming_from"
# What runs here: KerasHub's own needs its TensorFlow, mlx-lm another machine.
RUN = {"", "functional_llm", "Transformers", "PEFT"}
HANDLES = ('"hf://HuggingFaceTB/SmolLM2-135M-Instruct"', '"smollm2_135m_instruct"')


def _blocks(name: str) -> list[tuple[str, str]]:
    """Returns whose a block is, and the block."""
    text = (PAGES / f"{name}.md").read_text(encoding="utf-8")
    found = re.findall(r'^```python(?: title="([\w-]+)")?\n(.*?)^```$', text, re.M | re.S)
    assert len(found) == text.count("```python")
    return found


@pytest.fixture
def names(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[str, Any]:
    """What the blocks of a page leave behind, with a tiny model in the place of theirs."""
    folder = save_tiny(tmp_path / "tiny")
    monkeypatch.chdir(tmp_path)
    found: dict[str, Any] = {}
    for owner, block in _blocks(request.param):
        code = block
        for handle in HANDLES:
            code = code.replace(handle, repr(str(folder)))
        tree = ast.parse(code)
        if owner in RUN:
            exec(compile(tree, f"{request.param}.md", "exec"), found)
    return found


@pytest.mark.parametrize("names", ["transformers"], indirect=True)
def test_transformers(names: dict[str, Any]) -> None:
    np.testing.assert_allclose(names["logits"], names["hf_logits"], atol=1e-4)
    np.testing.assert_allclose(names["edited_logits"], names["hf_edited"], atol=1e-4)
    assert not torch.allclose(names["hf_edited"], names["hf_logits"], atol=1e-3)
    assert names["text"] == names["hf_text"]
    assert names["prompt"] == names["hf_prompt"]
    again = names["again"].state_dict()
    for key, tensor in names["model"].state_dict().items():
        assert torch.equal(again[key], tensor), key


@pytest.mark.parametrize("names", ["peft"], indirect=True)
def test_peft(names: dict[str, Any]) -> None:
    ids = names["ids"]
    with torch.no_grad():
        theirs = names["peft_model"](torch.tensor(ids)).logits
        merged = names["merged_model"](torch.tensor(ids)).logits
    np.testing.assert_allclose(names["adapted"](ids), theirs, atol=1e-4)
    np.testing.assert_allclose(names["lora_backbone"](ids), merged, atol=1e-4)
    np.testing.assert_allclose(names["merged"](ids), merged, atol=1e-4)
    assert np.abs(np.asarray(names["adapted"](ids)) - names["backbone"](ids)).max() > 1e-5


@pytest.mark.parametrize("names", ["keras_hub", "mlx_lm"], indirect=True)
def test_the_side_of_this_library_runs(names: dict[str, Any]) -> None:
    assert isinstance(names["text"], str) and names["text"]
    assert names["lora_backbone"].trainable_variables
