"""Kernels of experts: each equals the definition, values and gradients, whatever it is given.

Shapes: B batch, T tokens, D in, F out, E experts, k experts chosen for each token.
"""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from functional_llm.kernels import ExpertFacts, choose_experts, expert_kernels

# B, T, E, k, and what is special.
CASES: dict[str, tuple[int, int, int, int, dict[str, Any]]] = {
    "some": (2, 13, 5, 2, {}),
    "padding": (2, 13, 5, 2, {"padding": True}),
    "more_experts_than_tokens": (1, 3, 40, 4, {}),
    "one_choice": (2, 9, 6, 1, {"padding": True}),
    "all_chosen": (2, 5, 4, 4, {"padding": True}),
    "one_expert_gets_everything": (1, 150, 3, 1, {"all_to": 1}),
    "nobody_goes_anywhere": (1, 6, 3, 2, {"all_padding": True}),
    "bfloat16": (2, 13, 5, 2, {"dtype": "bfloat16", "padding": True}),
}
D, F = 7, 6
KERNELS = {kernel.name: kernel for kernel in expert_kernels()}
OTHERS = [name for name in KERNELS if name != "every"]


def _arrays(name: str, seed: int = 0) -> dict[str, Any]:
    batch, tokens, experts, k, special = CASES[name]
    rng, dtype = np.random.default_rng(seed), special.get("dtype", "float32")
    chosen = rng.random((batch, tokens, experts)).argsort(2)[:, :, :k]
    if "all_to" in special:
        chosen[:] = special["all_to"]
    padding = rng.random((batch, tokens, 1)) < (0.3 if special.get("padding") else 0)
    chosen = np.where(padding | bool(special.get("all_padding")), experts, chosen)
    shapes = {
        "x": (batch, tokens, D),
        "weights": (batch, tokens, k),
        "up": (experts, D, F),
        "down": (experts, F, D),
        "bias": (experts, F),
    }
    arrays = {key: jnp.asarray(rng.normal(size=shape), dtype) for key, shape in shapes.items()}
    gradient = jnp.asarray(rng.normal(size=shapes["x"]), dtype)
    return {"factors": arrays, "experts": jnp.asarray(chosen, "int32"), "gradient": gradient}


def _compute(kernel: Any, factors: dict[str, Any], experts: Any) -> Any:
    """A block of two products, with a bias, weighted on both sides."""
    routing = kernel.route(experts, len(factors["up"]))
    weights = kernel.spread_choices(factors["weights"], experts, routing)
    rows = kernel.spread(factors["x"], routing) * weights
    rows = kernel.multiply(rows, factors["up"], routing)
    rows = jnp.tanh(rows + kernel.of_experts(factors["bias"], routing))
    return kernel.collect(kernel.multiply(rows, factors["down"], routing) * weights, routing)


def _values_and_gradients(name: str, case: str, seed: int = 0) -> dict[str, np.ndarray]:
    arrays = _arrays(case, seed)

    @jax.jit
    def run(factors: Any, experts: Any, gradient: Any) -> Any:
        out, pull = jax.vjp(lambda x: _compute(KERNELS[name], x, experts), factors)
        return {"out": out, **pull(gradient)[0]}

    return {key: np.asarray(x, "float32") for key, x in run(**arrays).items()}


@pytest.mark.parametrize("case", CASES)
def test_kernels_equal_the_definition(case: str) -> None:
    expected = _values_and_gradients("every", case)
    limit = 3e-2 if CASES[case][4].get("dtype") else 1e-5
    for name in OTHERS:
        received = _values_and_gradients(name, case)
        for key, value in expected.items():
            difference = np.abs(received[key] - value).max() / max(1.0, np.abs(value).max())
            assert difference <= limit, (name, key, difference)


def test_the_definition_is_a_sum_over_the_chosen() -> None:
    arrays = _arrays("padding")
    numbers = {key: np.asarray(x, "float64") for key, x in arrays["factors"].items()}
    expected = np.zeros(numbers["x"].shape)
    for (b, t, j), expert in np.ndenumerate(np.asarray(arrays["experts"])):
        if expert < len(numbers["up"]):
            weight = numbers["weights"][b, t, j]
            inner = weight * numbers["x"][b, t] @ numbers["up"][expert]
            inner = np.tanh(inner + numbers["bias"][expert])
            expected[b, t] += weight * inner @ numbers["down"][expert]
    received = _compute(KERNELS["every"], arrays["factors"], arrays["experts"])
    np.testing.assert_allclose(received, expected, atol=1e-5)
