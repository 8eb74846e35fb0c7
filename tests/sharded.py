"""A process with simulated devices, which does on a mesh what another does on one device.

`python sharded.py FOLDER WORKS MESH...` prints a line of JSON for each mesh, with what the works,
"all" or some of them, have given; "-" stands for one device. With "resume" for the works, it trains
on the first mesh, and goes on with a half of that on each of them. There are eight devices; with
`FLM_PLACE=NUMBER/COUNT@HOST:PORT` in the environment, this is one of so many processes that have
them together.
"""

import gc
import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("FLM_PLACE", "0/1@")
os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count="
    f"{8 // int(os.environ['FLM_PLACE'].partition('@')[0].partition('/')[2])}"
)

import jax
import keras
import numpy as np

import functional_llm as flm
from functional_llm.graph.placing import own_rows, place_rows, to_numpy
from functional_llm.xla import rewriter
from quick import compile_quickly

jax.config.update("jax_numpy_dtype_promotion", "strict")
# It rounds activations to bfloat16, where the CPU has that: a sum in another order, as on a mesh,
# then moves some by 1/256, and losses by 5e-4. Without it they agree as those of float32 do.
rewriter.RULES = tuple(rule for rule in rewriter.RULES if rule.name != "int8_as_half")
PLACE, _, COORDINATOR = os.environ["FLM_PLACE"].partition("@")
NUMBER, COUNT = map(int, PLACE.split("/"))
IDS = np.random.default_rng(0).integers(0, 190, (8, 24)).astype("int32")
STEPS = 20


def train(model: flm.Backbone) -> list[float]:
    """Returns the losses of some steps."""
    steps = flm.training.LossModel(model, chunk_size=16)
    steps.compile(keras.optimizers.Adam(1e-3))
    ids = own_rows(IDS, len(IDS))
    history = steps.fit(ids, batch_size=len(ids), epochs=STEPS, shuffle=False, verbose=0)
    return list(history.history["loss"])


def flops(model: flm.Backbone) -> Any:
    """Returns the operations that a device does in a training step.

    Of rows of whole chunks, and long, so that what the optimizer does hardly counts: with `data`
    each device does all of that.
    """
    steps = flm.training.LossModel(model, chunk_size=8)
    steps.compile(keras.optimizers.Adam(1e-3))
    steps.optimizer.build(steps.trainable_variables)
    weights = steps.trainable_variables, steps.non_trainable_variables
    groups = *weights, steps.optimizer.variables, steps.metrics_variables
    state = tuple([variable.value for variable in group] for group in groups)
    ids = place_rows(np.tile(IDS, (1, 10)), len(IDS))
    costs: Any = jax.jit(steps.train_step).lower(state, (ids,)).compile().cost_analysis()
    return costs["flops"]


def measure(folder: str, mesh: str, names: list[str]) -> dict[str, Any]:
    """Returns what a model computes on a mesh: of the works below those with these names."""
    keras.utils.set_random_seed(0)
    gc.collect()  # the model on the mesh before
    if mesh != "-":
        # All else of a layer is on each device of an axis of experts; 4 heads are on each of 8.
        most = 1.0 if "experts" in mesh or mesh == "model=8" else 0.05
        layout = flm.sharding.layout(folder, flm.sharding.mesh(mesh), most_replicated=most)
        keras.distribution.set_distribution(layout)
    before = bytes_read()
    with most_on_a_device() as samples:
        backbone = flm.Backbone.from_preset(folder)
    read, share = bytes_read() - before, on_devices()
    generator = flm.TextGenerator(backbone, None)
    prompts = [row[: 3 + i].tolist() for i, row in enumerate(IDS)]
    works: dict[str, Callable[[], Any]] = {
        "logits": lambda: to_numpy(backbone(IDS)).tolist(),
        "text": lambda: generator.generate_ids(prompts, max_new_tokens=6),
        "one row": lambda: generator.generate_ids(prompts[:1], max_new_tokens=6),
        "flops": lambda: flops(backbone),
        "lora on int8": lambda: train(flm.peft.lora(flm.quantize(backbone, "int8"), rank=4)),
        "lora": lambda: train(flm.peft.lora(backbone, rank=4)),
        "all weights": lambda: train(backbone),
        "read": lambda: read,
        "peak": lambda: [max(samples), share, max(v.value.nbytes for v in backbone.weights)],
        "bytes": lambda: sum(
            v.value.addressable_shards[0].data.nbytes for v in backbone.trainable_variables
        ),
    }
    return {name: work() for name, work in works.items() if name in names or "all" in names}


def on_devices() -> int:
    """Returns the bytes that the fullest of the devices holds now."""
    held: Counter[Any] = Counter()
    parts = [part for array in jax.live_arrays() for part in array.addressable_shards]
    # A part is an array itself, which lives from the first look at it on.
    buffers = {part.data.unsafe_buffer_pointer(): part for part in parts}
    for part in buffers.values():
        held[part.device] += part.data.nbytes
    return max(held.values())


@contextmanager
def most_on_a_device() -> Iterator[list[int]]:
    """Yields a list of what the fullest device holds each time that it gets another array."""
    samples = [0]

    def sampled(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            array = function(*arguments, **options)
            samples.append(on_devices())
            return array

        return call

    with ExitStack() as stack:
        for module, name in (
            (jax, "make_array_from_callback"),
            (jax, "device_put"),
            (jax.numpy, "asarray"),
            (jax.numpy, "array"),
        ):
            function = getattr(module, name)
            stack.enter_context(mock.patch.object(module, name, sampled(function)))
        yield samples


def bytes_read() -> int:
    """Returns how many bytes this process has read from files so far."""
    return int(Path("/proc/self/io").read_text().split()[1])


class Stop(keras.callbacks.Callback):
    """Ends a run in the middle of a step after the fourth batch."""

    def __init__(self) -> None:
        super().__init__()
        self.batches = 0

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.batches += 1
        if self.batches == 4:
            raise KeyboardInterrupt


def _say_nothing(line: str) -> None:
    """Receives what is said of a run."""


def resume(folder: str, mesh: str, others: list[str]) -> dict[str, Any]:
    """Returns losses and last weights of a run on a mesh, and of those that go on with half of it.

    Args:
        folder: Of the model.
        mesh: Of the run.
        others: Meshes to go on with.
    """
    ids = np.random.default_rng(1).integers(0, 190, (32, 24)).astype("int32")
    places = np.tile(np.arange(24, dtype="int32"), (32, 1))
    rows = flm.training.Rows(ids, places, np.zeros_like(ids), np.roll(ids, -1, 1))
    settings = flm.training.Settings(steps=6, batch_size=8, checkpoint_every=3)

    def run(mesh: str, output: Path, resume: bool, *callbacks: Any) -> Any:
        keras.utils.set_random_seed(0)
        layout = flm.sharding.layout(folder, flm.sharding.mesh(mesh))
        keras.distribution.set_distribution(layout)
        model = flm.Backbone.from_preset(folder)
        history = flm.training.train(
            model,
            rows,
            None,
            settings,
            output,
            resume=resume,
            callbacks=callbacks,
            say=_say_nothing,
        )
        return {
            "losses": history.losses,
            "weights": [np.asarray(v).tolist() for v in model.variables],
        }

    with TemporaryDirectory() as name:
        with suppress(KeyboardInterrupt):
            run(mesh, Path(name, "stopped"), False, Stop())
        for other in others:
            shutil.copytree(Path(name, "stopped"), Path(name, other))
        results = {other: run(other, Path(name, other), True) for other in others}
        return {"whole": run(mesh, Path(name, "whole"), False), **results}


if __name__ == "__main__":
    compile_quickly(True)
    if COUNT > 1:
        flm.sharding.join_processes(COORDINATOR, NUMBER, COUNT)
    if sys.argv[2] == "resume":
        print(json.dumps(resume(sys.argv[1], sys.argv[3], sys.argv[3:])), flush=True)
        sys.exit()
    for name in sys.argv[3:]:
        print(json.dumps(measure(sys.argv[1], name, sys.argv[2].split(","))), flush=True)
