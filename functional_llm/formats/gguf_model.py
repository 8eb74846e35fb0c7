"""A model in a GGUF file, under Hugging Face's config keys and tensor names, in its layout.

The names come from the `gguf` package's own map.
"""

from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import gguf
import numpy as np

from functional_llm.backbones.family import Family, ModelConfig
from functional_llm.backbones.transforms import Row, Rows
from functional_llm.backbones.wrapper import with_other_prefix
from functional_llm.formats.gguf_file import GGUFFile, open_gguf
from functional_llm.formats.gguf_grids import read_grid
from functional_llm.formats.grid import Grid
from functional_llm.formats.hf_config import read_config
from functional_llm.formats.source import Source, known_family
from functional_llm.formats.tensor_reader import float_dtype
from functional_llm.formats.tensor_source import TensorSource
from functional_llm.formats.weight_table import (
    in_one_tensor,
)
from functional_llm.graph.types import JSON
from functional_llm.tokenizers import TextTokenizer, save_tokenizer

_Tokenizer = TypeVar("_Tokenizer", bound=TextTokenizer)

_ARCHITECTURE = "general.architecture"
_KEYS = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.key_length": "head_dim",
    "attention.sliding_window": "sliding_window",
    "attention.sliding_window_pattern": "layer_types",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "rope.freq_base": "rope_theta",
    "rope.freq_base_swa": "rope_local_base_freq",
    "vocab_size": "vocab_size",
}
_ROPE_KEYS = {
    "rope.scaling.factor": "factor",
    "rope.scaling.original_context_length": "original_max_position_embeddings",
    "rope.scaling.attn_factor": "attention_factor",
    "rope.scaling.yarn_beta_fast": "beta_fast",
    "rope.scaling.yarn_beta_slow": "beta_slow",
    "rope.scaling.yarn_log_multiplier": "mscale_all_dim",
    "rope.scaling.yarn_mscale": "mscale",  # which a family's `gguf_given` says
    "attention.temperature_scale": "llama_4_scaling_beta",
}
# Tensors of the first layer, one of which is there if the key is true.
_TOLD_BY_TENSORS = {
    "attention_bias": ("attn_q.bias", "attn_qkv.bias"),
    "attention_out_bias": ("attn_output.bias",),
    "bias": ("attn_qkv.bias",),
    "mamba_rms_norm": ("ssm_norm.weight",),
    "mlp_bias": ("ffn_up.bias",),
    "qkv_bias": ("attn_q.bias",),
    "qk_layernorm": ("attn_q_norm.weight",),
    "use_bias": ("attn_q.bias",),
    "use_qk_norm": ("attn_q_norm.weight",),
    "use_qkv_bias": ("attn_q.bias",),
}
# Pairs of tensors: in some layer the first is there and the second is not, if the key is true.
_TOLD_BY_ABSENCE = {"attention_k_eq_v": ("attn_k.weight", "attn_v.weight")}
# Tensors of the first layer, of which as many are there as the key says.
_COUNTED_BY_TENSORS = {"num_ln_in_parallel_attn": ("attn_norm.weight", "attn_norm_2.weight")}
_FREQUENCIES = "rope_freqs.weight"
_DOES_NOT_TURN = 1e29  # what llama.cpp divides the frequency by of channels that do not turn
_LONG_ROPE = {
    "short_factor": "rope_factors_short.weight",
    "long_factor": "rope_factors_long.weight",
}


class GGUFModel(Source):
    """A `.gguf` file, of any quantisation."""

    suffix = ".gguf"
    words = "a .gguf file"

    @property
    def _file(self) -> GGUFFile:
        return open_gguf(self.path)

    @property
    def family(self) -> Family:
        families: dict[str, list[Family]] = {}
        for family in self.families.values():
            own = [family.gguf_architecture] if family.gguf_architecture else []
            for name in (*own, *family.other_gguf_architectures):
                families.setdefault(name, []).append(family)
        architecture = self._file.metadata.get(_ARCHITECTURE)
        sharing = known_family(architecture, f"{self.path}: {_ARCHITECTURE}", families)
        return self._told_apart(sharing)

    def _told_apart(self, sharing: Sequence[Family]) -> Family:
        """Returns the one of several families with an architecture whose key is in the file."""
        metadata = self._file.metadata
        prefix = f"{metadata[_ARCHITECTURE]}."

        def tells(told_by: str | tuple[str, Any] | None) -> bool:
            if isinstance(told_by, tuple):
                return metadata.get(prefix + told_by[0]) == told_by[1]
            return told_by is not None and bool(metadata.get(prefix + told_by))

        there = [f for f in sharing if tells(f.gguf_told_by)]
        found = there or [family for family in sharing if family.gguf_told_by is None]
        if len(found) != 1:
            keys = {_with_prefix(prefix, f): f.model_type for f in sharing if f.gguf_told_by}
            raise ValueError(
                f"{self.path}: the architecture {prefix[:-1]!r} may be one of the families "
                f"{[family.model_type for family in sharing]}. Expected one of the keys that tell "
                f"them apart ({keys}), received {[f.gguf_told_by for f in there]}."
            )
        return found[0]

    @cached_property
    def config(self) -> ModelConfig:
        return read_config(_read_raw_config(self._file, self.family), self.family)

    @property
    def rows(self) -> Rows:
        shapes, layers = self._file.shapes, range(self.config.num_layers)

        def is_there(source: str) -> bool:
            return "blk." not in source or any(source.format(i) in shapes for i in layers)

        own = [row for row in self.family.gguf_rows(self.config) if is_there(row[0])]
        replaced = {target for _, target, _ in own}
        return [*own, *(_as_converted(row) for row in super().rows if row[1] not in replaced)]

    def open_tensors(self, names: Sequence[str]) -> TensorSource:
        return _HuggingFaceView(self._file, names, self.family, self.config)

    def read_tokenizer(self, cls: type[_Tokenizer]) -> _Tokenizer:
        return cls.from_gguf_metadata(self._file.metadata)

    def write_tokenizer(self, folder: Path) -> None:
        save_tokenizer(self.read_tokenizer(TextTokenizer), folder)


def _with_prefix(prefix: str, family: Family) -> str:
    """Returns the key that tells a family, in words."""
    told_by = family.gguf_told_by
    return f"{prefix}{told_by if isinstance(told_by, str) else '{}={}'.format(*told_by or ())}"


def _as_converted(row: Row) -> Row:
    """Returns a row for what llama.cpp's converter makes of its tensor.

    The converter stacks the tensors of a variable, and lays the parts of fused tensors one behind
    the other.
    """
    source, target, transform = row
    whole = transform if isinstance(transform, str) else replace(transform, groups=1)
    return in_one_tensor(source), target, whole


def _read_raw_config(file: GGUFFile, family: Family) -> JSON:
    """Returns the metadata as the keys of a `config.json`.

    Args:
        file: The open file.
        family: The family it belongs to.

    Raises:
        ValueError: At keys of the architecture that have no counterpart, all named.
    """
    prefix = f"{file.metadata[_ARCHITECTURE]}."
    keys = {**_KEYS, **family.gguf_keys}
    given = {
        key.removeprefix(prefix): value
        for key, value in file.metadata.items()
        if key.startswith(prefix)
    }
    given = family.gguf_given(given)
    given = {key: value for key, value in given.items() if key not in family.gguf_ignored}
    config = {keys[key]: given.pop(key) for key in list(given) if key in keys}
    if further := given.pop("nextn_predict_layers", 0):  # which llama.cpp counts with the others
        config["num_hidden_layers"] -= further
    if config.get("sliding_window") == 0:  # llama.cpp's word for none
        config["sliding_window"] = None
    config.setdefault("vocab_size", file.shapes.get("token_embd.weight", (0,))[0])
    config["tie_word_embeddings"] = "output.weight" not in file.shapes
    if "layer_types" in config:  # whether each layer has a window
        config["layer_types"] = [family.layer_types[bool(x)] for x in config["layer_types"]]
    heads = config.get("num_key_value_heads")
    if isinstance(heads, list):  # none in layers that keep a state
        config["layer_types"] = [family.layer_types[x == 0] for x in heads]
        (config["num_key_value_heads"],) = set(heads) - {0} or {0}
    local = "rope_local_base_freq"  # a key of Gemma 3 alone
    if local in config and local not in family.config_keys:
        config["rope_parameters"] = {"sliding_attention": {"rope_theta": config.pop(local)}}
    # llama.cpp, too, tells these by the tensors.
    told = {
        key: any(f"blk.0.{tensor}" in file.shapes for tensor in tensors)
        for key, tensors in _TOLD_BY_TENSORS.items()
        if key in family.config_keys
    }
    for key, (there, absent) in _TOLD_BY_ABSENCE.items():
        if key in family.config_keys:
            blocks = [f"blk.{i}." for i in range(config["num_hidden_layers"])]
            with_first = [x for x in blocks if x + there in file.shapes]
            told[key] = any(x + absent not in file.shapes for x in with_first)
    for key, tensors in _COUNTED_BY_TENSORS.items():
        if key in family.config_keys:
            config[key] = sum(f"blk.0.{tensor}" in file.shapes for tensor in tensors)
    head_dim = config.get("head_dim")
    sizes: list[Any] = [config.get(key) for key in ("hidden_size", "num_attention_heads")]
    if head_dim is None and all(type(size) is int and size > 0 for size in sizes):
        head_dim = sizes[0] // sizes[1]
        if "head_dim" in family.config_keys:
            config["head_dim"] = head_dim
    if "partial_rotary_factor" in family.config_keys and head_dim:
        turning = given.pop("rope.dimension_count", head_dim)
        config["partial_rotary_factor"] = part_of_head(turning, head_dim)
    for key in ("rope.dimension_count", "attention.value_length"):
        if given.pop(key, head_dim) != head_dim:
            raise ValueError(f"{file.path}: {prefix}{key} unlike the head size {head_dim}.")
    scaling = _rope_scaling(file, given)
    if scaling:
        config["rope_scaling"] = scaling
        original = "original_max_position_embeddings"
        if original in scaling and original in family.config_keys:
            config[original] = scaling[original]
    if given:
        raise ValueError(
            f"{file.path} has keys that nobody handles: {sorted(prefix + key for key in given)}."
        )
    defaults = told | family.gguf_defaults(told | config)
    parts = {key: x | config[key] for key, x in defaults.items() if _are_dicts(x, config.get(key))}
    return defaults | config | parts


def _are_dicts(*values: object) -> bool:
    return all(isinstance(value, dict) for value in values)


def part_of_head(part: int, whole: int) -> float:
    """Returns the quotient, made large enough for `int(whole * quotient)` to be the part."""
    share = part / whole
    return share if int(whole * share) == part else float(np.nextafter(share, 1))


def _rope_scaling(file: GGUFFile, given: JSON) -> JSON:
    kind = given.pop("rope.scaling.type", "none")
    given.pop("rope.scaling.finetuned", None)
    if _LONG_ROPE["long_factor"] in file.shapes:
        read = {key: file.read(name, "float32").tolist() for key, name in _LONG_ROPE.items()}
        values = {_ROPE_KEYS[key]: given.pop(key) for key in list(given) if key in _ROPE_KEYS}
        return {"rope_type": "longrope", **read, **values}
    if kind == "none":
        given.pop("rope.scaling.original_context_length", None)
        if given.get("rope.scaling.factor") == 1:
            del given["rope.scaling.factor"]
        if _FREQUENCIES not in file.shapes:
            return {}
        factors = file.read(_FREQUENCIES, "float32")
        turning = factors == 1
        if (turning | (factors >= _DOES_NOT_TURN)).all():
            part = part_of_head(2 * int(turning.sum()), 2 * len(factors))
            return {"rope_type": "proportional", "partial_rotary_factor": part}
        return {"rope_type": "frequency_factors", "factors": tuple(factors.tolist())}
    values = {_ROPE_KEYS[key]: given.pop(key) for key in list(given) if key in _ROPE_KEYS}
    if "mscale_all_dim" in values:  # llama.cpp takes the other mscale to be 1
        values = {"mscale": 1.0, **values}
    return {"rope_type": kind, **values}


class _HuggingFaceView:
    """Tensors of a GGUF file under Hugging Face's names and in its layout.

    Args:
        file: The open file.
        names: Hugging Face's names that the model needs.
        family: The family it belongs to.
        config: Its config.
    """

    def __init__(
        self, file: GGUFFile, names: Sequence[str], family: Family, config: ModelConfig
    ) -> None:
        self._file = file
        self._family = family
        self._heads = {
            projection: getattr(config, field) for projection, field in family.gguf_permuted.items()
        }
        architectures = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}
        name_map = gguf.get_tensor_name_map(
            architectures[file.metadata[_ARCHITECTURE]], config.num_layers
        )
        self._names: dict[str, str] = {}
        stored = {ours: theirs for theirs, ours in family.stored_prefixes.items()}
        for name in names:
            as_stored = with_other_prefix(name, stored)
            for known in (name, name.removeprefix(family.base_prefix), as_stored):
                theirs = name_map.get_name(known, try_suffixes=(".weight", ".bias"))
                if theirs in file.shapes:
                    self._names.setdefault(name, theirs)
        left = set(file.shapes) - set(self._names.values()) - {_FREQUENCIES, *_LONG_ROPE.values()}
        self._names.update({name: name for name in left})
        self._values = {
            f"{key}.{layer}": value
            for key in family.gguf_values
            for layer, value in enumerate(file.metadata.get(key, ()))
        }
        self.shapes = dict.fromkeys(self._values, (1,)) | {
            name: file.shapes[theirs][:: -1 if self._is_transposed(name) else 1]
            for name, theirs in self._names.items()
        }

    def _is_transposed(self, name: str) -> bool:
        return any(fnmatch(name, pattern) for pattern in self._family.gguf_transposed)

    def read(self, name: str, dtype: str) -> np.ndarray:
        """Returns one tensor in a dtype."""
        if name in self._values:
            return np.array([self._values[name]], float_dtype(dtype))
        if any(fnmatch(name, pattern) for pattern in self._family.gguf_offset):
            # In float32: the added one costs a narrow type most of its digits.
            return (self._file.read(self._names[name], "float32") - 1).astype(float_dtype(dtype))
        return self._moved(name, self._file.read(self._names[name], dtype))

    def read_grid(self, name: str) -> Grid | None:
        """Returns one tensor as the 4-bit integers of the file; `None` if it has others."""
        if name in self._values:
            return None
        grid = read_grid(self._file, self._names[name])
        return None if grid is None else grid.map(lambda array: self._moved(name, array))

    def _moved(self, name: str, array: np.ndarray) -> np.ndarray:
        """Returns an array of a tensor in Hugging Face's layout."""
        if self._is_transposed(name):
            return array.T
        for projection, num_heads in self._heads.items():
            if f".{projection}." in name:
                pairs = array.reshape(num_heads, -1, 2, *array.shape[1:])
                return pairs.swapaxes(1, 2).reshape(array.shape)
        return array
