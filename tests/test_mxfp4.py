"""MXFP4 tensors of a directory: as Transformers reads them, and damaged ones."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import functional_llm as flm
from configs import CONFIGS
from functional_llm.formats.mxfp4 import unpacked
from functional_llm.formats.safetensors_reader import open_safetensors
from mxfp4_files import load_packed, pack_experts
from reference import reference_logits, save_reference

NAME = "gpt_oss_clamped"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_reference(CONFIGS[NAME], tmp_path)
    pack_experts(tmp_path)
    return tmp_path


def test_a_model_with_mxfp4_experts_computes_as_in_transformers(
    folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    ids = np.random.default_rng(0).integers(0, 128, (2, 40))
    theirs = load_packed(folder)
    expected = reference_logits(theirs, ids)
    ours = flm.Backbone.from_preset(folder)
    np.testing.assert_allclose(np.asarray(ours(ids)), expected, atol=1e-4, rtol=0)

    saved = tmp_path_factory.mktemp("saved")  # as plain numbers
    ours.save_preset(saved)
    again = transformers.AutoModelForCausalLM.from_pretrained(
        saved, attn_implementation="eager", dtype=torch.float32
    )
    np.testing.assert_allclose(reference_logits(again.eval(), ids), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_numbers_are_those_of_transformers(tmp_path: Path, dtype: str) -> None:
    random = np.random.default_rng(0)
    blocks = random.integers(0, 256, (3, 50, 70, 16), "uint8")  # more than is read at once
    scales = random.integers(3, 250, (3, 50, 70), "uint8")
    plain = random.normal(size=(2, 3)).astype("float32")
    save_file({"x_blocks": blocks, "x_scales": scales, "y": plain}, tmp_path / "model.safetensors")
    source = unpacked(open_safetensors(tmp_path))
    assert source.shapes == {"x": (3, 70 * 32, 50), "y": (2, 3)}
    expected = convert_moe_packed_tensors(
        torch.tensor(blocks), torch.tensor(scales), dtype=torch.float32
    )
    read = source.read("x", dtype)
    assert read.dtype.name == dtype
    np.testing.assert_array_equal(read.astype("float32"), expected.numpy())
    np.testing.assert_array_equal(source.read("y", "float32"), plain)


def _changed(folder: Path, change: Any) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def test_parts_that_do_not_fit_are_all_named(folder: Path) -> None:
    first, second = (f"model.layers.{i}.mlp.experts" for i in (0, 1))

    def change(tensors: dict[str, np.ndarray]) -> None:
        blocks = f"{first}.gate_up_proj_blocks"
        tensors[blocks] = np.ascontiguousarray(tensors[blocks][..., :15])
        del tensors[f"{first}.down_proj_scales"]
        scales = f"{second}.down_proj_scales"
        tensors[scales] = tensors[scales].astype("int8")

    _changed(folder, change)
    with pytest.raises(ValueError, match="MXFP4 tensors that do not fit together") as caught:
        flm.Backbone.from_preset(folder)
    problems = str(caught.value).splitlines()[1:-1]
    assert sorted(problem.strip() for problem in problems) == [
        f"'{first}.down_proj_blocks' of shape (5, 32, 1, 16): no '{first}.down_proj_scales' "
        "beside it",
        f"'{first}.gate_up_proj_blocks': expected shape (5, 64, 1, 16), 16 bytes for each of "
        f"'{first}.gate_up_proj_scales' of shape (5, 64, 1), received (5, 64, 1, 15)",
        f"'{second}.down_proj_blocks' and its scales: expected bytes (U8), received U8 and I8",
    ]


def test_an_expert_too_few_and_a_block_too_many_are_named(folder: Path) -> None:
    def change(tensors: dict[str, np.ndarray]) -> None:
        for part in ("blocks", "scales"):
            name = f"model.layers.1.mlp.experts.down_proj_{part}"
            tensors[name] = np.concatenate([tensors[name]] * 2, axis=2)[:4]

    _changed(folder, change)
    expected = "down_proj': expected shape \\(5, 32, 32\\), received \\(4, 64, 32\\)"
    with pytest.raises(ValueError, match=expected):
        flm.Backbone.from_preset(folder)
