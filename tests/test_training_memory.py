"""Memory of training: what a step takes is known before it runs, and what it freed is kept."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

import functional_llm as flm
from configs import CONFIGS
from functional_llm.training import LossModel, Rows, Settings, StepMemory, predict_memory, train
from functional_llm.training.cross_entropy import choose_chunk_size
from functional_llm.training.rematerialize import REMAT, remat_name


def test_the_environment_has_the_last_word(monkeypatch: pytest.MonkeyPatch) -> None:
    from functional_llm.training import keep_memory

    monkeypatch.setenv("MALLOC_ARENA_MAX", "4")
    assert not keep_memory()


@pytest.mark.parametrize(
    ("platform", "vocabulary_size", "tokens", "expected"),
    [
        ("cpu", 49_152, 1024, 512),
        ("cpu", 128_256, 8192, 512),
        ("cpu", 128, 100, 100),
        ("cpu", 49_152, 600, 384),  # not 512 and 88
        ("gpu", 128_256, 8192, 2048),
        ("gpu", 262_144, 8192, 1024),
        ("gpu", 49_152, 8192, 4096),
        ("gpu", 32_000, 32_768, 8192),
        ("gpu", 128, 65_536, 8192),
        ("gpu", 128_256, 2100, 1152),
        ("gpu", 10_000_000, 8192, 512),
        ("tpu", 128_256, 8192, 2048),
        ("gpu", 128_256, 1, 1),
    ],
)
def test_chunks_of_the_loss(
    platform: str, vocabulary_size: int, tokens: int, expected: int
) -> None:
    assert choose_chunk_size(platform, vocabulary_size, tokens) == expected


def test_chunks_leave_little_padding() -> None:
    for tokens in range(1, 9000, 61):
        size = choose_chunk_size("gpu", 128_256, tokens)
        assert size <= 2048 and -(-tokens // size) * size - tokens < 128 * -(-tokens // size)


def test_names_of_rematerialisation(tmp_path: Path) -> None:
    assert [remat_name(x) for x in (False, True, *REMAT)] == ["nothing", "layer", *REMAT]
    with pytest.raises(ValueError, match="nothing, products, layer, received 'all'"):
        Settings(steps=1, remat="all")
    with pytest.raises(ValueError, match="without a loss"):
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        _tiny(tmp_path).compile("sgd", loss, remat="layer")


def _tiny(folder: Path, num_layers: int = 2) -> flm.Backbone:
    config = {**CONFIGS["llama_grouped"], "num_hidden_layers": num_layers}
    (folder / "config.json").write_text(json.dumps(config))
    return flm.Backbone.from_preset(folder, load_weights=False)


def _predict(backbone: Any, batch_size: int, remat: str) -> StepMemory:
    model = LossModel(backbone, 64, remat)
    model.compile("adamw")
    ids = np.zeros((batch_size, 64), "int32")
    memory = predict_memory(model, ({"token_ids": ids}, ids, np.ones(ids.shape, "float32")))
    assert memory is not None
    return memory


def test_the_memory_of_a_step_is_known_before_it_runs(tmp_path: Path) -> None:
    backbone = _tiny(tmp_path)
    memory = _predict(backbone, 2, "nothing")
    weights = sum(v.value.nbytes for v in backbone.variables)
    # Weights, the moments of AdamW, the metrics and the batch; all but the batch written over.
    assert 3 * weights < memory.state < 3 * weights + 10_000
    assert memory.results < 10_000
    assert memory.temporary > weights  # gradients
    wider = _predict(backbone, 8, "nothing")
    assert wider.temporary > 2 * memory.temporary
    assert wider.peak == wider.state + wider.results + wider.temporary + wider.code
    assert wider.limit is not None and wider.limit > 1e8


def test_a_step_that_does_not_fit_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = _tiny(tmp_path)
    before = [np.array(v) for v in backbone.variables]
    ids = np.arange(60, dtype="int32").reshape(6, 10)
    rows = Rows(ids, np.tile(np.arange(10, dtype="int32"), (6, 1)), np.ones_like(ids), ids)
    settings = Settings(steps=1, batch_size=3, checkpoint_every=0)
    steps: list[None] = []  # one for each trace
    monkeypatch.setattr(LossModel, "_train_step", _counted(LossModel._train_step, steps))
    monkeypatch.setattr("functional_llm.training.memory._limit", lambda own: 1000)
    lines: list[str] = []
    with pytest.raises(
        ValueError, match=r"fits into 0\.00 GB.*a smaller batch than 3 rows"
    ) as error:
        train(backbone, rows, None, settings, tmp_path / "run", say=lines.append)
    assert 'remat="products" or "layer"' in str(error.value)
    assert "bfloat16" in str(error.value)
    assert all(np.array_equal(a, b) for a, b in zip(before, backbone.variables, strict=True))
    assert lines[0].startswith("Memory of a step: ") and "of 0.00 GB (estimate: " in lines[0]
    steps.clear()
    train(backbone, rows, None, settings, tmp_path / "run", say=lines.append, check_memory=False)
    assert len(steps) == 1  # Keras finds what was traced and compiled for the estimate
    assert "step 1" in lines[-1]


def _counted(function: Any, calls: list[None]) -> Any:
    def call(*arguments: Any) -> Any:
        calls.append(None)
        return function(*arguments)

    return call


def test_numbers_of_memory_in_words() -> None:
    memory = StepMemory(state=2_000_000_000, results=0, temporary=9_500_000_000)
    assert memory.describe() == (
        "Memory of a step: 11.50 GB (estimate: weights and optimizer 2.00 GB, "
        "activations and gradients 9.50 GB)"
    )
    memory.check("")  # nobody knows the limit
    replace(memory, limit=11_500_000_000).check("")
    with pytest.raises(ValueError, match="Buy more"):
        replace(memory, limit=11_499_999_999).check("Buy more.")
