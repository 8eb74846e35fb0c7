"""Measures small models of some families beside KerasHub's: decoding, and steps of training.

The weights are random, and the same in both libraries; each works in turns in this process.

    python -m benchmarks.families qwen3_moe
    python -m benchmarks.families qwen3_5 --only decode --rounds 3
"""

import argparse
import os
import statistics
from collections.abc import Callable
from typing import Any

os.environ["KERAS_BACKEND"] = "jax"  # before keras is imported

import keras
import keras_hub
import numpy as np

import functional_llm as flm
from benchmarks.delta_nets import in_turns

_PROMPT, _NEW = 32, 128
_ROWS, _TOKENS = 2, 256  # of a step of training
_SIZES = {
    "vocabulary_size": 32000,
    "num_query_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "hidden_dim": 512,
    "tie_word_embeddings": True,
}
# Family -> what KerasHub calls it, and its sizes.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_5": (
        "Qwen3_5",
        {
            **_SIZES,
            "num_layers": 8,
            "intermediate_dim": 1536,
            "linear_num_key_heads": 8,
            "linear_num_value_heads": 8,
            "linear_key_head_dim": 64,
            "linear_value_head_dim": 64,
        },
    ),
    "qwen3_moe": (
        "Qwen3Moe",
        {
            **_SIZES,
            "num_layers": 4,
            "intermediate_dim": 1536,
            "moe_intermediate_dim": 512,
            "num_experts": 32,
            "num_experts_per_tok": 4,
            "sliding_window_size": None,
        },
    ),
}


def _make(family: str) -> tuple[Any, flm.Backbone]:
    """Returns KerasHub's task of a random model, and ours of the same numbers."""
    name, sizes = MODELS[family]
    theirs = getattr(keras_hub.models, f"{name}Backbone")(**sizes)
    random = np.random.default_rng(0)
    for variable in theirs.trainable_weights:
        noise = 0.1 * random.normal(size=variable.shape)
        variable.assign(np.asarray(variable) + noise.astype("float32"))
    task = getattr(keras_hub.models, f"{name}CausalLM")(backbone=theirs, preprocessor=None)
    return task, flm.from_keras_hub(theirs)


def _decode_programs(task: Any, ours: flm.Backbone) -> dict[str, Callable[[], Any]]:
    """Returns greedy decoding by both libraries.

    The texts of states differ: KerasHub's absorb the padding behind a prompt (docs/keras_hub.md).
    """
    task.compile(sampler="greedy", jit_compile=True)
    generator = flm.TextGenerator(ours, None)
    prompt = np.random.default_rng(1).integers(100, 500, (1, _PROMPT)).astype("int32")

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


def measure_decoding(task: Any, ours: flm.Backbone, rounds: int) -> None:
    """Prints tokens a second behind the first, and the median of the rounds' ratios."""
    seconds = in_turns(_decode_programs(task, ours), rounds)
    speeds = {
        name: [
            (_NEW - 1) / (whole - short)
            for whole, short in zip(seconds[f"{name}, {_NEW}"], seconds[f"{name}, 1"], strict=True)
        ]
        for name in ("functional_llm", "KerasHub")
    }
    _print("decoding, tokens a second", speeds)


def measure_training(task: Any, ours: flm.Backbone, rounds: int) -> None:
    """Prints tokens a second of steps that train all weights, each library with its own loss."""
    ids = np.random.default_rng(2).integers(0, 32000, (_ROWS, _TOKENS + 1)).astype("int32")
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    task.compile(optimizer=keras.optimizers.Adam(1e-5), loss=loss, jit_compile=True)
    ours.compile(keras.optimizers.Adam(1e-5))
    x, y = ids[:, :-1], ids[:, 1:]
    inputs = {"token_ids": x, "padding_mask": np.ones_like(x)}
    programs: dict[str, Callable[[], Any]] = {
        "functional_llm": lambda: ours.train_on_batch(x, y),
        "KerasHub": lambda: task.train_on_batch(inputs, y),
    }
    seconds = in_turns(programs, rounds)
    speeds = {name: [x.size / second for second in found] for name, found in seconds.items()}
    _print("training, tokens a second", speeds)


def _print(what: str, speeds: dict[str, list[float]]) -> None:
    for name, of_rounds in speeds.items():
        least, most = min(of_rounds), max(of_rounds)
        middle = statistics.median(of_rounds)
        print(f"{what}: {name:16} {middle:8.1f} ({least:.1f} to {most:.1f})", flush=True)
    ratios = [x / y for x, y in zip(*speeds.values(), strict=True)]
    print(f"{what}: ratio {statistics.median(ratios):.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.families",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("family", choices=MODELS)
    parser.add_argument("--only", choices=("decode", "train"))
    parser.add_argument("--rounds", type=int, default=5, help="rounds that count (5)")
    options = parser.parse_args()
    task, ours = _make(options.family)
    if options.only != "train":
        measure_decoding(task, ours, options.rounds)
    if options.only != "decode":
        measure_training(task, ours, options.rounds)


if __name__ == "__main__":
    main()
