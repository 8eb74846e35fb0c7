"""Runs where TensorFlow is: what tokenizers in a graph return, for tests/test_in_graph.py.

    python in_graph_check.py checkout packages job.pickle answers.json

`packages` is the folder of packages of the interpreter that has what this library needs beside
Keras: those that are here go first.
"""

import json
import pickle
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, sys.argv[1])
sys.path.append(sys.argv[2])


def ask(tokenizer, texts, rows, options, traced):
    """Returns ids and texts, or why not; operation by operation unless traced, which is quicker."""
    import tensorflow as tf

    tf.config.run_functions_eagerly(not traced)
    try:
        in_graph = tokenizer.as_tf(**options)
    except ValueError as error:
        return {"refused": str(error)}
    ids = in_graph.tokenize(texts)
    ragged = tf.ragged.constant(rows, tf.int32, ragged_rank=1)
    decoded = {
        f"{skip}{continues}": [
            text.decode() for text in in_graph.detokenize(ragged, skip, continues).numpy()
        ]
        for skip, continues in ((True, False), (False, True))
    }
    return {"ids": ids.to_list(), "dtype": ids.dtype.name, "decoded": decoded}


def use(tokenizer, texts, folder):
    """Returns what a pipeline gives, what a SavedModel, and the edges."""
    import tensorflow as tf

    tf.config.run_functions_eagerly(False)
    in_graph = tokenizer.as_tf()
    dataset = tf.data.Dataset.from_tensor_slices(texts)
    one_by_one = [ids.numpy().tolist() for ids in dataset.map(in_graph.tokenize)]
    batches = [ids.to_list() for ids in dataset.batch(3).map(in_graph.tokenize)]
    tf.saved_model.save(in_graph, folder)
    saved = tf.saved_model.load(folder).tokenize_batch(tf.constant(texts)).to_list()
    try:
        in_graph.tokenize([b"a\xff"])
        broken = ""
    except tf.errors.InvalidArgumentError as error:
        broken = str(error)
    try:
        in_graph.detokenize([-1])
        negative = ""
    except tf.errors.InvalidArgumentError as error:
        negative = str(error)
    return {
        "one by one": one_by_one,
        "batches": sum(batches, []),
        "saved": saved,
        "empty": [in_graph.tokenize(tf.constant([], tf.string)).to_list()]
        + [in_graph.tokenize("").numpy().tolist(), in_graph.tokenize(["", ""]).to_list()],
        "broken": broken,
        "negative": negative,
    }


def export(models, folder):
    """Writes SavedModels; returns what our generator writes."""
    import functional_llm as flm

    texts = {}
    for name, handle, prompts, count in models:
        backbone = flm.Backbone.from_preset(handle)
        tokenizer = flm.Tokenizer.from_preset(handle)
        texts[name] = flm.TextGenerator(backbone, tokenizer).generate(prompts, count)
        backbone.export(
            f"{folder}/{name}", "tf_saved_model", tokenizer=tokenizer, max_new_tokens=count
        )
    return texts


if __name__ == "__main__":
    with open(sys.argv[3], "rb") as file:
        jobs = pickle.load(file)
    kinds: dict[str, Any] = {"ask": ask, "use": use, "export": export}
    answers = {name: kinds[kind](*arguments) for name, (kind, arguments) in jobs.items()}
    Path(sys.argv[4]).write_text(json.dumps(answers), "utf-8")
