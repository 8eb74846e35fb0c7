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
EVERYWHERE = (
    "padding",
    "more_experts_than_tokens",
)  # the others are for the walk, by far the oddest


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
    for name in OTHERS if case in EVERYWHERE else ["walk"]:
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


@pytest.mark.parametrize("dropped", ["weights", "bias", "experts"])
def test_the_comparison_sees_what_is_dropped(dropped: str) -> None:
    arrays = _arrays("padding")
    factors, experts = arrays["factors"], arrays["experts"]
    right = _compute(KERNELS["walk"], factors, experts)
    if dropped == "experts":
        experts = jnp.roll(experts, 1, axis=1)
    else:
        factors = {**factors, dropped: jnp.roll(factors[dropped], 1, axis=0)}
    assert np.abs(_compute(KERNELS["walk"], factors, experts) - right).max() > 1e-2


def test_kernels_can_be_mapped() -> None:
    two = [_arrays("some", seed) for seed in (0, 1)]
    experts = jnp.stack([x["experts"] for x in two])
    factors = jax.tree.map(lambda *x: jnp.stack(x), *(x["factors"] for x in two))
    received = jax.jit(jax.vmap(lambda f, e: _compute(KERNELS["walk"], f, e)))(factors, experts)
    for row, x in zip(received, two, strict=True):
        expected = _compute(KERNELS["every"], x["factors"], x["experts"])
        np.testing.assert_allclose(row, expected, atol=1e-5)


def test_memory_of_many_tokens_has_no_copy_of_the_matrices() -> None:
    tokens, experts, k, size = 256, 16, 2, 128

    def run(x: Any, kernel: Any, chosen: Any) -> Any:
        walk = KERNELS["walk"]
        routing = walk.route(chosen, experts)
        return walk.collect(walk.multiply(walk.spread(x, routing), kernel, routing), routing)

    shapes = ((1, tokens, size), (experts, size, size))
    x, kernel = (jax.ShapeDtypeStruct(shape, "float32") for shape in shapes)
    chosen = jax.ShapeDtypeStruct((1, tokens, k), "int32")
    analysis: Any = jax.jit(run).lower(x, kernel, chosen).compile().memory_analysis()
    assert analysis.temp_size_in_bytes < 6 * tokens * k * size * 4
    assert analysis.temp_size_in_bytes < tokens * k * size * size * 4 / 20  # gathered


CPU = ExpertFacts(platform="cpu", tokens=512, choices=4, experts=32)


@pytest.mark.parametrize(
    ("facts", "kernel", "reason"),
    [
        (CPU, "walk", "32 experts for a token, and 4 are chosen"),
        (replace(CPU, tokens=1), "one_by_one", "first choice"),
        (replace(CPU, tokens=1, choices=32), "every", "32 rows are more than 16"),
        (replace(CPU, platform="other", tokens=0), "every", "needs JAX"),
        (replace(CPU, platform="gpu", tokens=8), "gathered", "this is gpu"),
        (replace(CPU, platform="gpu", tokens=64), "every", "more than the experts"),
        (replace(CPU, platform="gpu"), "tiles", "not ragged"),
        (replace(CPU, platform="tpu"), "ragged", "not walk"),
    ],
)
def test_the_choice_and_its_reason(facts: ExpertFacts, kernel: str, reason: str) -> None:
    chosen, why = choose_experts(facts)
    assert chosen.name == kernel
    assert reason in why


def test_a_kernel_can_be_asked_for_if_it_can() -> None:
    assert choose_experts(CPU, "tiles")[0].name == "tiles"
    with pytest.raises(ValueError, match="'walk' cannot compute this, because it needs JAX"):
        choose_experts(replace(CPU, platform="other"), "walk")
    with pytest.raises(ValueError, match="'tiles'.* the kernel of experts, received 'grouped'"):
        choose_experts(CPU, "grouped")
