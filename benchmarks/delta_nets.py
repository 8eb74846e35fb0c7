"""Measures a prefill through a gated delta net.

The layer has 16 heads of 128 x 128 and reads 512 tokens: in chunks as models do, token by token in
a plain `lax.scan`, and as the definition has it, which stock files hold.

    python -m benchmarks.delta_nets
    python -m benchmarks.delta_nets --channels
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

os.environ["KERAS_BACKEND"] = "jax"  # before keras is imported

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from functional_llm.kernels.delta_rule import DeltaInputs, delta_rule, delta_rule_in_chunks

_HEADS, _TOKENS, _SIZE = 16, 512, 128


def _by_tokens(inputs: DeltaInputs, state: Any) -> tuple[Any, Any]:
    """Returns what the rule does, token by token."""
    rows = (inputs.query, inputs.key, inputs.value, inputs.decay)
    tokens = (*(jnp.moveaxis(x, -2, 0) for x in rows), jnp.moveaxis(inputs.rate, -1, 0))

    def step(state: Any, token: Any) -> tuple[Any, Any]:
        *rows, rate = token
        one = DeltaInputs(*(x[..., None, :] for x in rows), rate[..., None])
        x, state = delta_rule_in_chunks(one, state)
        return state, x[..., 0, :]

    state, x = lax.scan(step, state, tokens)
    return jnp.moveaxis(x, 0, -2), state


def _layer_programs(channels: int) -> dict[str, Callable[[], Any]]:
    """Returns the ways through a layer, and through its gradients.

    Args:
        channels: How many decays a token has in each head.
    """
    random = np.random.default_rng(0)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(random.normal(size=shape), "float32")

    def unit(x: jax.Array) -> jax.Array:
        return x / jnp.linalg.norm(x, axis=-1, keepdims=True)

    tensors = (
        unit(normal(1, _HEADS, 1, _TOKENS, _SIZE)),
        unit(normal(1, _HEADS, 1, _TOKENS, _SIZE)),
        normal(1, _HEADS, 1, _TOKENS, _SIZE),
        -jnp.exp(normal(1, _HEADS, 1, _TOKENS, channels)),
        jax.nn.sigmoid(normal(1, _HEADS, 1, _TOKENS)),
    )
    state = normal(1, _HEADS, 1, _SIZE, _SIZE)
    rules = {"chunks": delta_rule_in_chunks, "scan": _by_tokens, "definition": delta_rule}
    if channels > 1:
        del rules["definition"]  # which has a number for each pair of tokens and channel
    programs: dict[str, Callable[[], Any]] = {}
    for name, rule in rules.items():

        def run(tensors: Any, rule: Any = rule) -> Any:
            return rule(DeltaInputs(*tensors), state)[0]

        def loss(tensors: Any, run: Any = run) -> Any:
            return jnp.sum(jnp.square(run(tensors)))

        forward, gradient = jax.jit(run), jax.jit(jax.grad(loss))
        programs[name] = lambda forward=forward: forward(tensors)
        programs[f"{name}, gradients"] = lambda gradient=gradient: gradient(tensors)
    return programs


def in_turns(programs: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Returns how long each took, in turns; the first round compiles, and does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for round_number in range(rounds + 1):
        for name, run in programs.items():
            begin = time.perf_counter()
            jax.block_until_ready(run())
            if round_number:
                seconds[name].append(time.perf_counter() - begin)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.delta_nets",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rounds", type=int, default=5, help="rounds that count (5)")
    parser.add_argument("--channels", action="store_true", help="each channel decays by itself")
    options = parser.parse_args()
    programs = _layer_programs(_SIZE if options.channels else 1)
    for name, seconds in in_turns(programs, options.rounds).items():
        best, middle = min(seconds) * 1e3, statistics.median(seconds) * 1e3
        print(f"{name:24} {best:8.1f} ms at best, {middle:8.1f} in the median")


if __name__ == "__main__":
    main()
