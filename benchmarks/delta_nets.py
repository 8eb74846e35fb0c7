"""Measures gated delta nets: a prefill through one layer, and decoding beside KerasHub.

The layer has 16 heads of 128 x 128 and reads 512 tokens: in chunks as models do, token by token in
a plain `lax.scan`, and as the definition has it, which stock files hold. The model is a small
Qwen 3.5 of random weights, the same in both libraries; each writes in turns in this process.

    python -m benchmarks.delta_nets layer
    python -m benchmarks.delta_nets layer --channels
    python -m benchmarks.delta_nets decode --rounds 5
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

import functional_llm as flm
from functional_llm.kernels.delta_rule import DeltaInputs, delta_rule, delta_rule_in_chunks

_HEADS, _TOKENS, _SIZE = 16, 512, 128
_PROMPT, _NEW = 32, 128
SHAPE = {
    "vocabulary_size": 32000,
    "num_layers": 8,
    "num_query_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "hidden_dim": 512,
    "intermediate_dim": 1536,
    "linear_num_key_heads": 8,
    "linear_num_value_heads": 8,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
    "tie_word_embeddings": True,
}


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


def _decode_programs() -> dict[str, Callable[[], Any]]:
    """Returns greedy decoding by both libraries.

    The texts differ: KerasHub's states absorb the padding behind the prompt (docs/keras_hub.md).
    """
    import keras_hub

    theirs = keras_hub.models.Qwen3_5Backbone(**SHAPE)
    random = np.random.default_rng(0)
    for variable in theirs.trainable_weights:
        noise = 0.1 * random.normal(size=variable.shape)
        variable.assign(np.asarray(variable) + noise.astype("float32"))
    task = keras_hub.models.Qwen3_5CausalLM(backbone=theirs, preprocessor=None)
    task.compile(sampler="greedy", jit_compile=True)
    generator = flm.TextGenerator(flm.from_keras_hub(theirs), None)
    prompt = random.integers(100, 500, (1, _PROMPT)).astype("int32")

    def of_theirs(count: int) -> list[int]:
        space = ((0, 0), (0, count))
        mask = np.pad(np.ones_like(prompt), space)
        inputs = {"token_ids": np.pad(prompt, space), "padding_mask": mask}
        output = task.generate(inputs, stop_token_ids=None)
        return np.asarray(output["token_ids"])[0, _PROMPT:].tolist()

    def of_ours(count: int) -> list[int]:
        return list(generator.generate_ids(prompt.tolist(), max_new_tokens=count)[0])

    return {
        f"{name}, {count}": lambda write=write, count=count: write(count)
        for name, write in (("functional_llm", of_ours), ("KerasHub", of_theirs))
        for count in (1, _NEW)
    }


def _seconds(programs: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
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
    parser.add_argument("what", choices=("layer", "decode"))
    parser.add_argument("--rounds", type=int, default=5, help="rounds that count (5)")
    parser.add_argument("--channels", action="store_true", help="each channel decays by itself")
    options = parser.parse_args()
    if options.what == "layer":
        programs = _layer_programs(_SIZE if options.channels else 1)
        for name, seconds in _seconds(programs, options.rounds).items():
            best, middle = min(seconds) * 1e3, statistics.median(seconds) * 1e3
            print(f"{name:24} {best:8.1f} ms at best, {middle:8.1f} in the median")
        return
    programs = _decode_programs()
    seconds = _seconds(programs, options.rounds)
    speeds = {
        name: [
            (_NEW - 1) / (whole - short)
            for whole, short in zip(seconds[f"{name}, {_NEW}"], seconds[f"{name}, 1"], strict=True)
        ]
        for name in ("functional_llm", "KerasHub")
    }
    for name, of_rounds in speeds.items():
        print(f"{name:16} {statistics.median(of_rounds):8.1f} tokens a second")
    ratios = [x / y for x, y in zip(*speeds.values(), strict=True)]
    print(f"ratio {statistics.median(ratios):.2f}")


if __name__ == "__main__":
    main()
