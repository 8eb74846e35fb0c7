"""Activations with weights, and the transforms of files that hold other numbers."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers.activations import XIELUActivation

import functional_llm as flm
from configs import CONFIGS
from functional_llm.backbones.transforms import TRANSFORMS, axis_added, axis_removed
from functional_llm.blocks.mlp import XIELU
from reference import make_reference, reference_logits

X = np.concatenate([np.linspace(-30, 30, 601), [-1e-6, -5e-7, 0.0, 5e-7, 1e-6]]).astype("float32")
NUMBERS = {
    "as training begins": {},
    "learned": {"alpha_p": 1.3, "alpha_n": -2.0},
    "other constants": {"alpha_p": -0.4, "alpha_n": 0.9, "beta": 0.8, "eps": -0.5},
}


@pytest.mark.parametrize("name", NUMBERS)
def test_xielu_is_transformers(name: str) -> None:
    theirs, ours = XIELUActivation(dtype=torch.float32), XIELU(name="xielu")
    ours(X[None])
    for key, value in NUMBERS[name].items():
        getattr(theirs, key).data.fill_(value)
        next(v for v in ours.variables if v.name == key).assign([value])
    with torch.no_grad():
        expected = theirs(torch.tensor(X)).numpy()
    np.testing.assert_allclose(ours(X[None])[0], expected, rtol=2e-4, atol=1e-5)
    trained = {v.name for v in ours.trainable_variables}
    assert trained == {name for name, _ in theirs.named_parameters()}


def test_constants_of_xielu_come_from_the_file(tmp_path: Path) -> None:
    model = make_reference(CONFIGS["apertus_default_rope"])
    for layer in model.model.layers:
        layer.mlp.act_fn.beta.fill_(0.9)
        layer.mlp.act_fn.eps.fill_(-0.3)
    model.save_pretrained(tmp_path / "theirs")
    ids = np.arange(40)[None] % 128
    ours = flm.Backbone.from_preset(tmp_path / "theirs")
    expected = reference_logits(model, ids)
    np.testing.assert_allclose(ours(ids), expected, atol=1e-4, rtol=0)
    ours.save_preset(tmp_path / "ours")
    again = type(model).from_pretrained(tmp_path / "ours").eval()
    assert float(again.model.layers[0].mlp.act_fn.beta) == pytest.approx(0.9)
    assert again.model.layers[0].mlp.act_fn.eps.shape == ()
    np.testing.assert_allclose(reference_logits(again, ids), expected, atol=1e-5, rtol=0)


def test_what_llama_cpp_has_of_state_space_models() -> None:
    # Mamba's converter writes -exp(A_log), and the convolution without its axis of one.
    logs = np.random.default_rng(0).normal(size=(6, 4)).astype("float32")
    transform = TRANSFORMS["log_of_negative"]
    np.testing.assert_allclose(transform.forward(-np.exp(logs)), logs, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(transform.inverse(logs), -np.exp(logs))
    assert transform.computes
    kernel = np.arange(24.0).reshape(6, 1, 4)
    for change, x in ((axis_removed(1), kernel), (axis_added(1), kernel[:, 0])):
        np.testing.assert_array_equal(change.join(change.split(x, [0])), x)
    assert axis_removed(1).split(kernel, [0])[0].shape == (6, 4)
    assert axis_added(1).split(kernel[:, 0], [0])[0].shape == kernel.shape
    (number,) = axis_added(0).split(np.array(2.5), [0])
    assert number.shape == (1,)
    assert axis_added(0).join([number]).shape == ()
