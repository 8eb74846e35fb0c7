"""The `.keras` files that stock Keras loads, with two keys more, which stock Keras ignores.

A file is a zip with three members, as Keras writes it. With more members Keras would unpack all of
them to a temporary folder at each load. Beside Keras's own keys,

- `config.json` has the key "language_model": the model's family and numbers, and its edits,
- `metadata.json`, which Keras does not read, has the key "tokenizer": file names and contents.
"""

import base64
import datetime
import json
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import keras

from functional_llm.files.json_files import parse_json_object
from functional_llm.files.replacing import check_writable, replaced_file
from functional_llm.graph.types import JSON

_OVERHEAD = 4096  # bytes of HDF5 for each variable, at most
CONFIG, METADATA, WEIGHTS = "config.json", "metadata.json", "model.weights.h5"


def write_keras_file(
    model: keras.Model,
    path: Path,
    description: Mapping[str, Any],
    tokenizer: Mapping[str, bytes],
) -> None:
    """Writes a model of stock layers. The file is replaced when it is complete.

    Weights go to the disk one after the other, through a temporary file beside.

    Args:
        model: The model.
        path: Where to.
        description: What to keep under "language_model", as JSON.
        tokenizer: Names and contents of the tokenizer's files.

    Raises:
        ValueError: If something in the model is not stock Keras.
        OSError: If it cannot be written.
    """
    config = json.loads(model.to_json())
    _check_stock(config, model.name)
    _forget_trainable_models(config)
    metadata = {
        "keras_version": keras.__version__,
        "date_saved": datetime.datetime.now().strftime("%Y-%m-%d@%H:%M:%S"),
        "tokenizer": {name: _encode(name, content) for name, content in tokenizer.items()},
    }
    # On a full disk, HDF5 prints a traceback for each variable, and nothing can stop it.
    size = sum(v.value.nbytes + _OVERHEAD for v in model.variables)
    check_writable(path.parent, size, size)
    with (
        replaced_file(path) as part,
        tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder,
    ):
        weights = Path(folder, WEIGHTS)
        try:
            model.save_weights(weights)
        except (OSError, RuntimeError) as error:  # HDF5 raises either
            raise OSError(f"{path} could not be written: {error}") from error
        with zipfile.ZipFile(part, "w") as archive:
            archive.writestr(METADATA, json.dumps(metadata))
            archive.writestr(CONFIG, json.dumps({**config, "language_model": description}))
            archive.write(weights, WEIGHTS)


def read_description(path: Path) -> JSON:
    """Returns what the file says of its language model.

    Raises:
        ValueError: If the file is damaged, or stock Keras has written it.
    """
    description = _read_json(path, CONFIG).get("language_model")
    if not isinstance(description, dict):
        raise ValueError(
            f"{path} does not say which language model it holds: Keras itself has written it, not "
            "`Backbone.save`. Make the backbone from the preset or file it came from, and call "
            f"`backbone.load_weights('{path}')`."
        )
    return description


def read_tokenizer(path: Path) -> dict[str, bytes]:
    """Returns names and contents of the tokenizer's files, if there is one.

    Raises:
        ValueError: If the file is damaged.
    """
    files = _read_json(path, METADATA).get("tokenizer", {})
    return {Path(name).name: _decode(name, content) for name, content in files.items()}


@contextmanager
def unpacked_weights(path: Path) -> Iterator[Path]:
    """Yields the weights as a temporary file. To read them inside the zip takes minutes.

    Raises:
        ValueError: If they are damaged (the checksum is compared) or missing.
        OSError: If there is no room for them.
    """
    with tempfile.TemporaryDirectory() as folder:
        try:
            with zipfile.ZipFile(path) as archive:
                archive.extract(WEIGHTS, folder)
        except (zipfile.BadZipFile, KeyError, EOFError) as error:
            raise _damaged(path, error) from None
        yield Path(folder, WEIGHTS)


def _read_json(path: Path, member: str) -> JSON:
    try:
        with zipfile.ZipFile(path) as archive:
            return parse_json_object(archive.read(member), member)
    except (zipfile.BadZipFile, KeyError, OSError, EOFError, ValueError) as error:
        raise _damaged(path, error) from None


def _damaged(path: Path, why: object) -> ValueError:
    return ValueError(
        f"{path} is damaged or no .keras file: {why}. Expected what `backbone.save` writes, a zip "
        f"with {CONFIG}, {METADATA} and {WEIGHTS}."
    )


def _encode(name: str, content: bytes) -> str:
    return base64.b64encode(content).decode() if _is_binary(name) else content.decode("utf-8")


def _decode(name: str, content: str) -> bytes:
    return base64.b64decode(content) if _is_binary(name) else content.encode("utf-8")


def _is_binary(name: str) -> bool:
    return name.endswith(".model")


def _check_stock(config: object, path: str) -> None:
    """Refuses what a lowering left, such as an activation function of a user's own."""
    if isinstance(config, list):
        for x in config:
            _check_stock(x, path)
    if not isinstance(config, dict):
        return
    module = config.get("module")
    if "class_name" in config and module is not None and not module.startswith("keras"):
        raise ValueError(
            f"'{path}' has a {config['class_name']} of the module '{module}' ({config['config']}), "
            "which stock Keras cannot load. Expected only what Keras itself has; put it into a "
            "layer of its own and say with `functional_llm.register_lowering` how it is written."
        )
    name = config["config"].get("name") if isinstance(config.get("config"), dict) else None
    for x in config.values():
        _check_stock(x, f"{path}/{name}" if isinstance(name, str) and name != path else path)


def _forget_trainable_models(config: object) -> None:
    """Keras would make all layers of a model trainable if the model says that it is."""
    if isinstance(config, list):
        for x in config:
            _forget_trainable_models(x)
    elif isinstance(config, dict):
        if config.get("class_name") == "Functional":
            config["config"]["trainable"] = None
        for x in config.values():
            _forget_trainable_models(x)
