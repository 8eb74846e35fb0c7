"""Runs where functional_llm is not: loads stock files, and prints what it measured as JSON lines.

    python stock_check.py

Every line of its input is the path of a file `name.keras`. Beside it lies `name.npz`: token ids
(B, T), the logits that they should give, and how to train the model: "" for not at all, "briefly",
or "fully", which is as users do it, and writes a file again.
"""

import json
import sys
import traceback
from pathlib import Path

import keras
import numpy as np
from keras import ops, tree

EAGER = keras.backend.backend() == "tensorflow"  # tracing takes longer than computing


def difference(received, expected):
    """Returns the largest difference of two arrays."""
    received = ops.convert_to_numpy(ops.cast(received, "float32"))
    assert received.shape == expected.shape
    return float(np.abs(received - expected).max())


def decode(decoder, token_ids, expected):
    """Returns the largest difference of logits; rows receive their tokens in unlike portions.

    Shorter portions are padded on the right, but that of one row with its first tokens on the left.
    """
    batch, length = token_ids.shape
    counts = np.array([[36, 1, 20], [36, 35, 16], [0, 36, 36]])
    assert (counts.sum(axis=0) == length).all()
    cache = tree.map_structure(
        lambda x: np.zeros((batch, 2 * length, *x.shape[2:]), "float32"), decoder.input["cache"]
    )
    states = tree.map_structure(
        lambda x: np.zeros((batch, *x.shape[1:]), "float32"), decoder.input.get("state", {})
    )
    filled, worst = np.zeros(batch, "int32"), 0.0
    for count in counts:
        new = np.zeros((batch, counts.max()), "int32")
        padding = np.where((filled == 0) & (np.arange(batch) == 1), new.shape[1] - count, 0)
        for i in range(batch):
            here = slice(padding[i], padding[i] + count[i])
            new[i, here] = token_ids[i, filled[i] : filled[i] + count[i]]
        begins = (filled - padding).astype("int32")
        inputs = {"token_ids": new, "cache_length": begins, "cache": cache}
        if states:
            inputs |= {"state": states, "new_length": (padding + count).astype("int32")}
        result = decoder.predict_on_batch(inputs)
        states = result.get("state", {})
        at = begins[:, None] + np.arange(new.shape[1])  # below 0: slots at the end, never seen
        pairs = zip(tree.flatten(cache), tree.flatten(result["cache_update"]), strict=True)
        for kept, update in pairs:
            kept[np.arange(batch)[:, None], at] = update
        for i in range(batch):
            here = slice(padding[i], padding[i] + count[i])
            logits = np.asarray(result["logits"][i, here], "float32")
            right = expected[i, filled[i] : filled[i] + count[i]]
            worst = np.abs(logits - right).max(initial=worst)
        filled = (filled + count).astype("int32")
    return float(worst)


def check(path):
    """Returns what one file shows."""
    with np.load(path.with_suffix(".npz")) as arrays:
        token_ids, expected = arrays["token_ids"], arrays["logits"]
        training = str(arrays["training"])
    model = keras.saving.load_model(path)
    decoder = model.get_layer("decoder")
    model.run_eagerly = decoder.run_eagerly = EAGER
    found = {
        "logits": difference(model.predict_on_batch(token_ids), expected),
        "decoded": decode(decoder, token_ids, expected),
        "inputs": sorted(decoder.input),
    }
    if training:
        found |= train(model, token_ids, EAGER and training == "briefly")
    if training == "fully":
        found |= write_again(model, token_ids, path)
    return found


def train(model, token_ids, eagerly):
    """Returns what three steps of training do."""
    found = {"frozen": sum(not v.trainable for v in model.variables)}
    before = [ops.convert_to_numpy(v) for v in model.variables]
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(1e-3), loss, run_eagerly=eagerly)
    fitted = model.fit(token_ids[:, :-1], token_ids[:, 1:], epochs=3, verbose=0)
    found["losses"] = fitted.history["loss"]
    now = [ops.convert_to_numpy(v) for v in model.variables]
    changed = [bool((a != b).any()) for a, b in zip(before, now, strict=True)]
    found["changed"] = sum(changed)
    found["frozen_changed"] = sum(
        moved and not v.trainable for moved, v in zip(changed, model.variables, strict=True)
    )
    return found


def write_again(model, token_ids, path):
    """Returns how far a file of the trained model is from it."""
    again = path.with_name(f"again_{keras.backend.backend()}.keras")
    model.save(again)
    loaded = keras.saving.load_model(again)
    again.unlink()
    trained = ops.convert_to_numpy(model.predict_on_batch(token_ids))
    return {"again": difference(loaded.predict_on_batch(token_ids), trained)}


if __name__ == "__main__":
    for line in sys.stdin:
        try:
            found = check(Path(line.strip()))
        except Exception:
            found = {"error": traceback.format_exc()}
        assert "functional_llm" not in sys.modules
        print(json.dumps({line.strip(): found}), flush=True)
