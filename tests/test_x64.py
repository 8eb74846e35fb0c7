"""With JAX's 64-bit types switched on, all runs, and generation writes what the graph says."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from quick import ENVIRONMENT

PROGRAM = """
import sys
import jax
import numpy as np
import functional_llm as flm

jax.config.update("jax_numpy_dtype_promotion", "strict")
for folder in sys.argv[1:]:
    backbone = flm.Backbone.from_preset(folder)
    for model, sampler in ((backbone, "greedy"), (flm.quantize(backbone), "top_k")):
        generator = flm.TextGenerator(model)
        if sampler != "greedy":
            sampler = flm.samplers.make(top_k=1, top_p=0.9, min_p=0.1, repetition_penalty=1.0)
        (new,) = generator.generate_ids([[1, 2, 3]], 4, sampler, seed=1)
        logits = model.predict(np.array([[1, 2, 3, *new]]), verbose=0)
        assert logits.dtype == "float32"
        assert logits[0, 2:-1].argmax(-1).tolist() == new, (new, logits.argmax(-1))
    model = flm.training.LossModel(flm.peft.lora(backbone, rank=2))
    schedule = flm.training.make_schedule("cosine", 1e-2, 9, 2)
    model.compile(flm.training.make_optimizer(schedule, clip_norm=1.0))
    ids = np.arange(12).reshape(2, 6)
    losses = model.fit(ids[:, :-1], ids[:, 1:], epochs=3, verbose=0).history["loss"]
    assert losses[-1] < losses[0]
"""


def test_all_runs_in_64_bits(checkpoint: Callable[[str], Path]) -> None:
    folders = [str(checkpoint(name)) for name in ("gemma3_two_ropes",)]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *folders],
        capture_output=True,
        text=True,
        env={**os.environ, **ENVIRONMENT, "JAX_ENABLE_X64": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
