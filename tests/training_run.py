"""A training run of a tiny model in a process of its own, which a test may kill."""

import json
import os
import signal
import sys
from typing import Any

import functional_llm as flm  # before Keras, which it sets to JAX
from functional_llm import training

# isort: split
import jax
import keras
import numpy as np

jax.config.update("jax_numpy_dtype_promotion", "strict")


def main(model_folder: str, output: str, kill_after: int, options: dict[str, Any]) -> None:
    """Trains with dropout, accumulation and a schedule.

    Args:
        model_folder: A tiny model.
        output: Where the checkpoint goes.
        kill_after: Number of batches after which the process kills itself; 0 for never.
        options: Changes to the settings; `stream` has files whose rows are streamed.
    """
    stream = options.pop("stream", None)
    keras.utils.set_random_seed(os.getpid())  # a resumed run must not depend on it
    backbone = flm.Backbone.from_preset(model_folder)
    model = flm.peft.lora(backbone, rank=4, dropout=0.2, seed=1)
    rng = np.random.default_rng(0)
    ids = [rng.integers(0, 99, n).astype("int32") for n in rng.integers(5, 20, 20)]
    held_out = training.pack([training.Example(x, np.arange(len(x)) > 3) for x in ids], 32)
    rows: training.Rows | training.StreamedRows = held_out
    if stream is not None:
        files = [training.stream_records(name) for name in stream]
        mixed = training.interleave(files, [0.7, 0.3], seed=2)
        tokenizer = flm.Tokenizer.from_preset(model_folder)
        rows = training.StreamedRows(mixed, tokenizer, 32, shuffle_buffer=9, open_rows=3)
    numbers = {"steps": 12, "batch_size": 2, "accumulate": 2, "evaluate_every": 5, "seed": 3}
    settings = training.Settings(**{**numbers, "checkpoint_every": 2, "warmup_steps": 2, **options})
    training.train(
        model,
        rows,
        held_out if stream is None else None,  # one program less
        settings,
        output,
        resume=True,
        arguments={"rank": 4},
        callbacks=[Killer(kill_after)],
    )


class Killer(keras.callbacks.Callback):
    """Ends the process at once after so many batches; never if that is 0."""

    def __init__(self, batches: int) -> None:
        super().__init__()
        self.left = batches

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), json.loads(sys.argv[4]))
