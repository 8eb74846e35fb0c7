"""Copies of Backbones and generators, by `copy.deepcopy` and by pickle."""

import copy
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

import functional_llm as flm
from configs import CONFIGS
from reference import save_reference

IDS = np.random.default_rng(0).integers(0, 128, (2, 10)).astype("int32")
in_both_ways = pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "pickle"]
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    save_reference(CONFIGS["llama_grouped"], path)
    return path


def test_a_clone_can_be_called_and_trained(tmp_path: Path) -> None:
    save_reference(CONFIGS["mistral_window"], tmp_path)
    backbone = flm.Backbone.from_preset(tmp_path)
    backbone.compile("adamw")
    clone = keras.models.clone_model(backbone)
    assert type(clone) is flm.Backbone and not np.array_equal(clone(IDS), backbone(IDS))
    clone.set_weights(backbone.get_weights())
    np.testing.assert_array_equal(clone(IDS), backbone(IDS))
    cache = flm.make_cache(clone, batch_size=2, num_slots=16)
    result = clone({"token_ids": IDS, "cache": cache})
    np.testing.assert_allclose(result["logits"], backbone(IDS), atol=1e-5)
    clone.fit(IDS, verbose=0)
    assert not np.array_equal(clone(IDS), backbone(IDS))


@in_both_ways
def test_what_is_frozen_stays_so_and_the_config_comes_along(
    folder: Path, duplicate: Callable[[Any], Any]
) -> None:
    backbone = flm.Backbone.from_preset(folder)
    model = flm.peft.lora(backbone, rank=2)
    new = duplicate(model)
    assert new.config == backbone.config
    assert duplicate(backbone).preset == str(folder)
    names = [v.path for v in model.trainable_variables]
    assert [v.path for v in new.trainable_variables] == names
    np.testing.assert_array_equal(new(IDS), model(IDS))
    before = [np.asarray(v) for v in new.non_trainable_variables]
    new.compile("sgd")
    new.fit(IDS, verbose=0)
    for variable, value in zip(new.non_trainable_variables, before, strict=True):
        np.testing.assert_array_equal(variable, value)
    assert flm.TextGenerator(new).context == flm.TextGenerator(model).context is not None


@in_both_ways
@pytest.mark.parametrize("has_loss", [False, True])
def test_a_compiled_model_goes_on_training(
    folder: Path, has_loss: bool, duplicate: Callable[[Any], Any]
) -> None:
    model = flm.peft.lora(flm.Backbone.from_preset(folder), rank=2)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True) if has_loss else None
    model.compile(keras.optimizers.Adam(1e-2), loss)
    model.fit(IDS, IDS, verbose=0)
    new = duplicate(model)
    losses = [x.fit(IDS, IDS, epochs=2, verbose=0).history["loss"] for x in (new, model)]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-6)  # Adam's moments came along


@in_both_ways
def test_a_generator_that_has_written(folder: Path, duplicate: Callable[[Any], Any]) -> None:
    generator = flm.TextGenerator(flm.Backbone.from_preset(folder))
    expected = generator.generate_ids([[1, 2, 3]], max_new_tokens=3)
    assert duplicate(generator).generate_ids([[1, 2, 3]], max_new_tokens=3) == expected


FULL_DISK = """
import resource, signal, sys
import functional_llm as flm
backbone = flm.Backbone.from_preset(sys.argv[1])
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
try:
    backbone.save_weights(sys.argv[2])
except OSError as error:
    print(error)
"""


def test_weights_on_a_full_disk(folder: Path, tmp_path: Path) -> None:
    arguments = [sys.executable, "-c", FULL_DISK, str(folder), str(tmp_path / "x.weights.h5")]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    assert "Expected a folder that can be written to, with room for" in done.stdout
    assert list(tmp_path.iterdir()) == []
