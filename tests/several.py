"""One of several processes, each with a device, that train a tiny model or do less.

`python several.py NUMBER COUNT HOST:PORT FOLDER WORK [OUTPUT]`; the works are below.
"""

import atexit
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "jax")

import keras
import numpy as np

import functional_llm as flm
from functional_llm.training import processes

NUMBER, COUNT = int(sys.argv[1]), int(sys.argv[2])
COORDINATOR, FOLDER, WORK = sys.argv[3:6]


class Ends(keras.callbacks.Callback):
    """Kills or stops this process in the middle of a run, if it is the one for that."""

    def __init__(self) -> None:
        super().__init__()
        self.batches = 0

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.batches += 1
        if self.batches == 4 and WORK == f"kill {NUMBER}":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.batches == 4 and WORK == f"stall {NUMBER}":
            time.sleep(60)


def train(output: Path) -> None:
    """Trains on a mesh of all devices, which a work may interrupt; writes the losses."""
    keras.utils.set_random_seed(0)
    layout = flm.sharding.layout(FOLDER, flm.sharding.mesh(f"fsdp={COUNT}"))
    keras.distribution.set_distribution(layout)
    model = flm.Backbone.from_preset(FOLDER)
    ids = np.random.default_rng(1).integers(0, 190, (32, 24)).astype("int32")
    places = np.tile(np.arange(24, dtype="int32"), (32, 1))
    rows = flm.training.Rows(ids, places, np.zeros_like(ids), np.roll(ids, -1, 1))
    settings = flm.training.Settings(steps=6, batch_size=8, checkpoint_every=3)
    history = flm.training.train(
        model, rows, None, settings, output, resume=True, callbacks=[Ends()], check_memory=False
    )
    print(history.losses, flush=True)


if __name__ == "__main__":
    if WORK == "versions" and NUMBER == 1:
        processes._COMPUTE = (*processes._COMPUTE, "safetensors")
    # Runs behind what joining registers: a thread in C++ would abort the process from here on.
    atexit.register(lambda: print(*(x.name for x in threading.enumerate()), flush=True))
    try:
        flm.sharding.join_processes(COORDINATOR, NUMBER, COUNT, lost_seconds=4, stalled_seconds=8)
        if WORK == "arguments":
            processes.agree("arguments", {"steps": 6, "rate": 0.1 * (1 + NUMBER)})
        elif WORK != "versions":
            train(Path(sys.argv[6]))
    except ValueError as error:
        print(error, file=sys.stderr, flush=True)
        processes.end_run()
        sys.exit(2)
    processes.end_run()
