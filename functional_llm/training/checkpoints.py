"""Training checkpoints: one safetensors file; a kill at any moment leaves a good one."""

import json
from glob import escape
from pathlib import Path
from typing import Any

import jax
import keras
import numpy as np
import safetensors

from functional_llm.files.processes import is_first
from functional_llm.files.replacing import replaced_file
from functional_llm.formats.safetensors_reader import read_header
from functional_llm.formats.safetensors_writer import read_dtype, write_one_by_one
from functional_llm.graph.placing import assign, to_numpy
from functional_llm.graph.types import JSON
from functional_llm.training.streaming import StreamState

_DATA = "data/"  # begins the names of the arrays of a stream's state


def training_state(model: keras.Model) -> dict[str, keras.Variable]:
    """Returns every variable that a training step changes, by a name that is the same in each run.

    These are the trainable weights, the states of random generators, and the optimizer's variables.

    Args:
        model: A compiled model.

    Raises:
        ValueError: If two trainable weights have the same path.
    """
    model.optimizer.build(model.trainable_variables)
    weights = {id(variable) for variable in model.weights}
    states = [v for v in model.non_trainable_variables if id(v) not in weights]
    named = {f"weights/{variable.path}": variable for variable in model.trainable_variables}
    if len(named) != len(model.trainable_variables):
        paths = sorted(variable.path for variable in model.trainable_variables)
        twice = sorted({path for path in paths if paths.count(path) > 1})
        raise ValueError(f"Expected variables of different paths, received twice: {twice}.")
    # Keras numbers the names of these two through a process; only their order stays the same.
    named |= {f"random/{i}": variable for i, variable in enumerate(states)}
    return named | {f"optimizer/{i}": v for i, v in enumerate(model.optimizer.variables)}


def save_checkpoint(
    path: Path, model: keras.Model, facts: JSON, data: StreamState | None = None
) -> None:
    """Writes the state of training. An earlier file is replaced when the new one is complete.

    Tensors are gathered and written one after the other. Of several processes, all must call this,
    and the first one writes.

    Args:
        path: The file.
        model: A compiled model.
        facts: What else to keep, as plain data.
        data: Where the training data are, if they are a stream.

    Raises:
        OSError: If the file cannot be written, on a full disk for example. An earlier file stays.
    """
    tensors: dict[str, Any] = dict(training_state(model))
    if data is not None:
        stream, arrays = data.to_tensors()
        facts = {**facts, "stream": stream}
        tensors |= {f"{_DATA}{name}": array for name, array in arrays.items()}
    metadata = {key: json.dumps(value) for key, value in facts.items()}
    try:
        if is_first():
            _remove_unfinished(path)
        with replaced_file(path) as beside:
            shapes = {name: (x.shape, jax.numpy.dtype(x.dtype)) for name, x in tensors.items()}
            write_one_by_one(beside, shapes, map(to_numpy, tensors.values()), metadata)
    except OSError as error:
        kept = "The one before is as it was." if path.exists() else "There was none before."
        raise OSError(f"{path} could not be written: {error}. {kept}") from error


def _remove_unfinished(path: Path) -> None:
    """Removes the files that `replaced_file` left beside when a run was killed while it wrote."""
    for file in path.parent.glob(f".{escape(path.name)}.*.part"):
        file.unlink(missing_ok=True)


def read_facts(path: Path) -> JSON:
    """Returns the facts that are kept in a checkpoint.

    Raises:
        ValueError: If the file is damaged.
    """
    try:
        with safetensors.safe_open(path, "numpy") as file:
            return {key: json.loads(value) for key, value in (file.metadata() or {}).items()}
    except (safetensors.SafetensorError, ValueError) as error:
        raise ValueError(
            f"{path} is damaged or no checkpoint: {error}. Delete it to begin anew."
        ) from error


def read_stream_state(path: Path) -> StreamState | None:
    """Returns where the training data were, if they are a stream.

    Raises:
        ValueError: If the file is damaged.
    """
    facts = read_facts(path).get("stream")
    if facts is None:
        return None
    with safetensors.safe_open(path, "numpy") as file:
        names = [name for name in file.keys() if name.startswith(_DATA)]
        tensors = {name.removeprefix(_DATA): file.get_tensor(name) for name in names}
    return StreamState.from_tensors(facts, tensors)


def load_checkpoint(path: Path, model: keras.Model) -> JSON:
    """Restores the state of training; returns the facts that are kept with it.

    Args:
        path: A file of `save_checkpoint`.
        model: A model compiled like the one that was saved.

    Raises:
        ValueError: If the file is damaged or of another model. The message names every difference.
    """
    facts = read_facts(path)
    variables = training_state(model)
    tensors = _open(path)
    problems = [f"{name} is not in the file" for name in variables if name not in tensors]
    problems += [f"{name} is not in the model" for name in tensors if name not in variables]
    for name in variables.keys() & tensors.keys():
        has, needs = _dtype_and_shape(tensors[name]), _dtype_and_shape(variables[name])
        if has != needs:
            problems.append(f"{name}: expected {needs}, received {has}")
    if problems:
        lines = "\n  ".join(sorted(problems))
        raise ValueError(f"{path} does not fit this model:\n  {lines}")
    for name, variable in variables.items():
        assign(variable, tensors[name])
    return facts


def _open(path: Path) -> dict[str, np.ndarray]:
    """Returns the tensors of the model, in a file whose pages are read when they are looked at."""
    file = np.memmap(path, np.uint8, "c")
    return {
        name: file[entry.offset : entry.offset + entry.size]
        .view(read_dtype(entry.stored))
        .reshape(entry.shape)
        for name, entry in read_header(path).items()
        if not name.startswith(_DATA)
    }


def _dtype_and_shape(x: np.ndarray | keras.Variable) -> str:
    return f"{getattr(x.dtype, 'name', x.dtype)} {tuple(x.shape)}"  # Keras's dtypes are strings


def check_arguments(path: Path, kept: JSON, given: JSON) -> None:
    """Compares the arguments of a run with those that are kept in a checkpoint.

    Args:
        path: The checkpoint, for the message.
        kept: The arguments of the run that saved it.
        given: The arguments of this run.

    Raises:
        ValueError: If they differ. The message names every difference.
    """
    given = json.loads(json.dumps(given))  # through JSON, tuples become lists
    names = sorted(kept.keys() | given.keys())
    lines = [
        f"{name}: {kept.get(name)!r} in the checkpoint, {given.get(name)!r} now"
        for name in names
        if kept.get(name) != given.get(name)
    ]
    if lines:
        raise ValueError(
            f"{path} was made with other arguments. Expected the same ones to go on; received:\n  "
            + "\n  ".join(lines)
            + "\nPass the checkpoint's arguments, or begin anew with another output."
        )
