"""Training checkpoints: one safetensors file; a kill at any moment leaves a good one."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import safetensors
from safetensors.flax import load_file, save_file


def training_state(model: keras.Model) -> dict[str, keras.Variable]:
    """Returns every variable that a training step changes, under a name that the next run has too.

    These are the trainable variables, the states of random generators, and the optimizer's
    variables. Frozen weights are not among them.

    Args:
        model: A compiled model.
    """
    model.optimizer.build(model.trainable_variables)
    weights = {id(variable) for variable in model.weights}
    states = [v for v in model.non_trainable_variables if id(v) not in weights]
    named = {f"weights/{variable.path}": variable for variable in model.trainable_variables}
    if len(named) != len(model.trainable_variables):
        paths = sorted(variable.path for variable in model.trainable_variables)
        twice = sorted({path for path in paths if paths.count(path) > 1})
        raise ValueError(f"Expected variables of different paths, received twice: {twice}.")
    # Keras numbers the names of these two through a process: only their order is the same again.
    named |= {f"random/{i}": variable for i, variable in enumerate(states)}
    return named | {f"optimizer/{i}": v for i, v in enumerate(model.optimizer.variables)}


def save_checkpoint(path: Path, model: keras.Model, facts: dict[str, Any]) -> None:
    """Writes the state of training. A file that is there is replaced at once, or not at all.

    Args:
        path: The file.
        model: A compiled model.
        facts: What else to keep, as plain data.

    Raises:
        OSError: If it cannot be written: the disk is full, say. The earlier file is as it was.
    """
    tensors = {name: v.value for name, v in training_state(model).items()}
    metadata = {key: json.dumps(value) for key, value in facts.items()}
    write_atomically(path, lambda beside: save_file(tensors, beside, metadata=metadata))


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Has a file written beside `path` and puts it there when it is safely on the disk.

    Args:
        path: The file to make or replace.
        write: Receives the path to write to.

    Raises:
        OSError: If writing fails; `path` is as it was.
    """
    beside = path.with_name(f"{path.name}.incomplete")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        write(beside)
        _sync(beside)
        os.replace(beside, path)
    except (OSError, safetensors.SafetensorError) as error:
        beside.unlink(missing_ok=True)
        kept = "The one before is as it was." if path.exists() else "There was none before."
        raise OSError(f"{path} could not be written: {error}. {kept}") from error
    _sync(path.parent)  # the name itself


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_facts(path: Path) -> dict[str, Any]:
    """Returns the facts of a checkpoint.

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


def load_checkpoint(path: Path, model: keras.Model) -> dict[str, Any]:
    """Puts a state back; returns the facts that were kept with it.

    Args:
        path: File of `save_checkpoint`.
        model: A model compiled as the one that was saved.

    Raises:
        ValueError: If the file is damaged or belongs to another model: every difference is named.
    """
    facts = read_facts(path)
    tensors, variables = load_file(path), training_state(model)
    problems = [f"{name} is not in the file" for name in variables if name not in tensors]
    problems += [f"{name} is not in the model" for name in tensors if name not in variables]
    for name in variables.keys() & tensors.keys():
        has, needs = describe(tensors[name]), describe(variables[name])
        if has != needs:
            problems.append(f"{name}: expected {needs}, received {has}")
    if problems:
        lines = "\n  ".join(sorted(problems))
        raise ValueError(f"{path} does not fit this model:\n  {lines}")
    for name, variable in variables.items():
        variable.assign(tensors[name])
    return facts


def describe(x: Any) -> str:
    """Returns dtype and shape as words."""
    return f"{np.dtype(x.dtype).name if not isinstance(x.dtype, str) else x.dtype} {tuple(x.shape)}"


def check_arguments(path: Path, kept: dict[str, Any], given: dict[str, Any]) -> None:
    """Raises a `ValueError` that names every argument which differs from the checkpoint's.

    Args:
        path: The checkpoint, for the message.
        kept: The arguments it was made with.
        given: Those of this run.
    """
    given = json.loads(json.dumps(given))  # as they come back: tuples are lists
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
            + "\nGive the checkpoint's, or begin anew with another output."
        )
