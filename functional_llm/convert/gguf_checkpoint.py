"""A GGUF file seen as a Hugging Face checkpoint: config keys, tensor names, layout of q and k.

The names come from the `gguf` package's own map. No family is named here.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import gguf
import numpy as np

from functional_llm.convert.gguf import GGUFFile

_KEYS = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.key_length": "head_dim",
    "rope.freq_base": "rope_theta",
    "vocab_size": "vocab_size",
}
_ROPE_KEYS = {
    "rope.scaling.factor": "factor",
    "rope.scaling.original_context_length": "original_max_position_embeddings",
    "rope.scaling.attn_factor": "attention_factor",
    "rope.scaling.yarn_beta_fast": "beta_fast",
    "rope.scaling.yarn_beta_slow": "beta_slow",
}
_FREQUENCIES = "rope_freqs.weight"


def read_raw_config(file: GGUFFile) -> dict[str, Any]:
    """Returns the metadata as the keys of a `config.json`.

    Raises:
        ValueError: At keys of the architecture that have no counterpart, all named.
    """
    prefix = f"{file.metadata['general.architecture']}."
    given = {
        key.removeprefix(prefix): value
        for key, value in file.metadata.items()
        if key.startswith(prefix)
    }
    config = {_KEYS[key]: given.pop(key) for key in list(given) if key in _KEYS}
    config.setdefault("vocab_size", file.shapes.get("token_embd.weight", (0,))[0])
    config["tie_word_embeddings"] = "output.weight" not in file.shapes
    head_dim = config.get("head_dim")
    sizes: list[Any] = [config.get(key) for key in ("hidden_size", "num_attention_heads")]
    if head_dim is None and all(type(size) is int and size > 0 for size in sizes):
        head_dim = sizes[0] // sizes[1]
    for key in ("rope.dimension_count", "attention.value_length"):
        if given.pop(key, head_dim) != head_dim:
            raise ValueError(f"{file.path}: {prefix}{key} unlike the head size {head_dim}.")
    scaling = _rope_scaling(file, given)
    if scaling:
        config["rope_scaling"] = scaling
    if given:
        raise ValueError(
            f"{file.path} has keys that nobody handles: {sorted(prefix + key for key in given)}."
        )
    return config


def _rope_scaling(file: GGUFFile, given: dict[str, Any]) -> dict[str, Any]:
    kind = given.pop("rope.scaling.type", "none")
    given.pop("rope.scaling.finetuned", None)
    if kind == "none":
        if _FREQUENCIES not in file.shapes:
            return {}
        factors = file.read(_FREQUENCIES, "float32")
        return {"rope_type": "frequency_factors", "factors": tuple(factors.tolist())}
    values = {_ROPE_KEYS[key]: given.pop(key) for key in list(given) if key in _ROPE_KEYS}
    return {"rope_type": kind, **values}


class GGUFCheckpoint:
    """Tensors of a GGUF file under Hugging Face's names and in its layout.

    Args:
        file: The open file.
        names: Hugging Face's names that the model needs.
        num_layers: Number of layers, for the map of names.
        permuted: Name of a projection -> its number of heads, where llama.cpp has reordered the
            rows of every head from two halves to pairs.
    """

    def __init__(
        self, file: GGUFFile, names: Iterable[str], num_layers: int, permuted: Mapping[str, int]
    ) -> None:
        self._file = file
        self._permuted = permuted
        architectures = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}
        name_map = gguf.get_tensor_name_map(
            architectures[file.metadata["general.architecture"]], num_layers
        )
        self._names: dict[str, str] = {}
        for name in names:
            theirs = name_map.get_name(name, try_suffixes=(".weight", ".bias"))
            if theirs in file.shapes:
                self._names[name] = theirs
        left = set(file.shapes) - set(self._names.values()) - {_FREQUENCIES}
        self._names.update({name: name for name in left})
        self.shapes = {name: file.shapes[theirs] for name, theirs in self._names.items()}

    def read(self, name: str, dtype: str) -> np.ndarray:
        """Returns one tensor in a dtype."""
        array = self._file.read(self._names[name], dtype)
        for projection, num_heads in self._permuted.items():
            if f".{projection}." in name:
                pairs = array.reshape(num_heads, -1, 2, *array.shape[1:])
                return pairs.swapaxes(1, 2).reshape(array.shape)
        return array
