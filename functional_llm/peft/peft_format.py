"""PEFT's own files for the methods it knows: their config and the names of their tensors.

Shapes: R rank. PEFT keeps matrices as torch does, (out, in).
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from keras import ops

from functional_llm.peft.adapter import Adapter
from functional_llm.peft.dora import DoRA, column_lengths
from functional_llm.peft.ia3 import IA3
from functional_llm.peft.linear import Linear
from functional_llm.peft.lora import LoRA

PREFIX = "base_model.model."

# Keys of an adapter_config.json that say nothing about what the adapter computes.
_IRRELEVANT = {
    *("task_type", "peft_type", "base_model_name_or_path", "revision", "inference_mode"),
    *("auto_mapping", "peft_version", "target_modules", "exclude_modules", "layers_to_transform"),
    *("fan_in_fan_out",),  # how the base keeps its matrices; the tensors are the same
    *("layers_pattern", "runtime_config", "megatron_core", "qalora_group_size"),
}
_LORA_KEYS = {"r", "lora_alpha", "lora_dropout", "rank_pattern", "alpha_pattern"}
_LORA_KEYS |= {"use_rslora", "use_dora", "init_lora_weights"}
_IA3_KEYS = {"feedforward_modules", "init_ia3_weights"}


@dataclass(frozen=True)
class Stored:
    """One layer's adapter in a file: how to make it, and its tensors by the adapter's own names."""

    cls: type[Adapter]
    options: dict[str, Any]
    weights: dict[str, np.ndarray]


def to_peft(
    adapters: Mapping[str, Adapter], names: Mapping[str, str], linears: Callable[[str], Linear]
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Returns the config and the tensors of an adapter in PEFT's format.

    Args:
        adapters: Path -> adapter, all of one class that PEFT knows.
        names: Path -> name of the module; a fused one has several paths, in order.
        linears: Path -> the layer of the model.
    """
    modules = {
        module: _joined([adapters.get(path) for path in paths], paths, linears)
        for module, paths in _parts(names).items()
        if any(path in adapters for path in paths)
    }
    first = next(iter(adapters.values()))
    config = {
        "peft_type": first.peft_type,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "inference_mode": True,
        "fan_in_fan_out": False,
        "modules_to_save": None,
        "target_modules": _target_modules(set(modules), names.values()),
    }
    if isinstance(first, IA3):
        scaled = {m for m, x in modules.items() if x.tensors["ia3_l"].shape[0] == 1}
        config |= {"feedforward_modules": _target_modules(scaled, names.values())}
    else:
        config |= _lora_config(modules, first)
    tensors = {
        f"{PREFIX}{module}.{name}": np.ascontiguousarray(array)
        for module, joined in modules.items()
        for name, array in joined.tensors.items()
    }
    return config, tensors


@dataclass(frozen=True)
class _Module:
    """What is stored for one module: tensors by PEFT's names, and the scale of LoRA's product."""

    tensors: dict[str, np.ndarray]
    scale: float = 1.0

    @property
    def rank(self) -> int:
        return self.tensors["lora_A.weight"].shape[0]


def _parts(names: Mapping[str, str]) -> dict[str, list[str]]:
    parts: dict[str, list[str]] = {}
    for path, module in names.items():
        parts.setdefault(module, []).append(path)
    return parts


def _joined(adapters: list[Any], paths: list[str], linears: Callable[[str], Linear]) -> _Module:
    """One adapter for the outputs of several layers side by side (or of one)."""
    present = [x for x in adapters if x is not None]
    if isinstance(present[0], IA3):
        return _Module({"ia3_l": _joined_ia3(adapters, paths, linears)})
    scale = present[0].scale
    factors = [None if x is None else [_array(f) for f in x.factors()] for x in adapters]
    a = np.concatenate([f[0] for f in factors if f is not None], axis=1)
    sizes = [1] if len(paths) == 1 else [linears(path).out_size for path in paths]
    blocks, row = [], 0
    for adapter, pair, size in zip(adapters, factors, sizes, strict=True):
        if pair is None or adapter is None:
            blocks.append(np.zeros((a.shape[1], size), "float32"))
            continue
        b = pair[1] * (adapter.scale / scale)
        blocks.append(np.zeros((a.shape[1], b.shape[1]), "float32"))
        blocks[-1][row : row + b.shape[0]] = b
        row += b.shape[0]
    tensors = {"lora_A.weight": a.T, "lora_B.weight": np.concatenate(blocks, axis=1).T}
    if isinstance(present[0], DoRA):
        lengths = [
            column_lengths(linears(path).kernel()) if x is None else x.magnitude
            for path, x in zip(paths, adapters, strict=True)
        ]
        tensors["lora_magnitude_vector"] = np.concatenate([_array(x) for x in lengths])
    return _Module(tensors, scale)


def _joined_ia3(
    adapters: list[Any], paths: list[str], linears: Callable[[str], Linear]
) -> np.ndarray:
    if not any(x is not None and x.scales_inputs for x in adapters):
        scales = [
            np.ones(linears(path).out_size, "float32") if x is None else _array(x.scale)
            for path, x in zip(paths, adapters, strict=True)
        ]
        return np.concatenate(scales)[:, None]
    if len(paths) > 1:
        raise ValueError(
            f"PEFT's files keep {paths} as one module, whose inputs cannot be scaled one by one. "
            "Leave them out of `feedforward`."
        )
    return _array(adapters[0].scale)[None, :]


def _lora_config(modules: Mapping[str, _Module], first: Any) -> dict[str, Any]:
    ranks = {m: x.rank for m, x in modules.items()}
    # PiSSA and fused modules raise the rank, and the scale stays.
    alphas = {m: x.scale * (x.rank**0.5 if first.rslora else x.rank) for m, x in modules.items()}
    rank, alpha = (Counter(v.values()).most_common(1)[0][0] for v in (ranks, alphas))
    return {
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": first.dropout_rate,
        "rank_pattern": {m: r for m, r in ranks.items() if r != rank},
        "alpha_pattern": {m: a for m, a in alphas.items() if a != alpha},
        "use_rslora": first.rslora,
        "use_dora": isinstance(first, DoRA),
        "init_lora_weights": True,
        "bias": "none",
    }


def _target_modules(modules: set[str], known: Iterable[str]) -> list[str]:
    """Last names where all modules of that name are meant, else full names."""
    known, targets = set(known), []
    for last in sorted({name.rpartition(".")[2] for name in modules}):
        same = {name for name in known if name.rpartition(".")[2] == last}
        targets += [last] if same <= modules else sorted(same & modules)
    return targets


def _array(x: Any) -> np.ndarray:
    return np.asarray(ops.convert_to_numpy(ops.cast(x, "float32")))


_SUFFIXES = {
    "lora_A.weight": "lora_a",
    "lora_B.weight": "lora_b",
    "lora_magnitude_vector": "magnitude",
    "ia3_l": "scale",
}


def from_peft(
    config: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    names: Mapping[str, str],
    linears: Callable[[str], Linear],
) -> tuple[dict[str, Stored], list[str]]:
    """Reads an adapter in PEFT's format.

    Args:
        config: The `adapter_config.json`.
        tensors: The file's tensors.
        names: Path -> name of the module; a fused one has several paths, in order.
        linears: Path -> the layer of the model.

    Returns:
        Path -> what is stored for it, and what does not fit.
    """
    kind = config.get("peft_type")
    problems = _check_keys(config, _LORA_KEYS if kind == "LORA" else _IA3_KEYS)
    parts = _parts(names)
    grouped: dict[str, dict[str, np.ndarray]] = {}
    for key, array in tensors.items():
        suffix = next((x for x in _SUFFIXES if key.endswith(f".{x}")), None)
        if not key.startswith(PREFIX) or suffix is None:
            problems.append(f"unknown tensor '{key}' of shape {array.shape}")
            continue
        module = key.removeprefix(PREFIX).removesuffix(f".{suffix}")
        if module not in parts:
            if f"the model has no module '{module}'" not in problems:
                problems.append(f"the model has no module '{module}'")
            continue
        own_layout = array.T if suffix.endswith("weight") else array.reshape(-1)
        grouped.setdefault(module, {})[_SUFFIXES[suffix]] = own_layout
        if suffix == "ia3_l":  # its shape tells which side it scales
            grouped[module]["is_row"] = np.array(array.ndim == 2 and array.shape[0] == 1)
    problems += [
        f"module '{module}' is one of the adapter's targets, and has no tensors"
        for module in parts
        if module not in grouped and _is_target(config, module)
    ]
    stored: dict[str, Stored] = {}
    make = _stored_ia3 if kind == "IA3" else partial(_stored_lora, config)
    for module, weights in grouped.items():
        whole = make(module, weights)
        sizes = [] if len(parts[module]) == 1 else [linears(x).out_size for x in parts[module]]
        try:
            pieces = _split(whole, sizes)
        except ValueError as error:
            problems.append(f"module '{module}': {error}")
            continue
        stored |= dict(zip(parts[module], pieces, strict=True))
    return stored, problems


def _is_target(config: Mapping[str, Any], module: str) -> bool:
    """Whether PEFT puts an adapter on a module: `check_target_module_exists` in its tuners."""
    named = _is_named(config.get("target_modules"), module)
    if not named or _is_named(config.get("exclude_modules"), module):
        return False
    numbers, patterns = config.get("layers_to_transform"), config.get("layers_pattern") or r"[^.]*"
    if numbers in (None, []) or not _is_suffix(config["target_modules"], module):
        return True
    patterns = [patterns] if isinstance(patterns, str) else patterns
    found = [re.match(rf"(?:^|.*?\.){x}\.(\d+)\.", module) for x in patterns]
    numbers = [numbers] if isinstance(numbers, int) else numbers
    return any(x is not None and int(x[1]) in numbers for x in found)


def _is_named(targets: Any, module: str) -> bool:
    """`targets` is a regular expression, or a list of names or of their ends."""
    if isinstance(targets, str):
        return re.fullmatch(targets, module) is not None
    return module in (targets or ()) or _is_suffix(targets, module)


def _is_suffix(targets: Any, module: str) -> bool:
    is_list = isinstance(targets, list)
    return is_list and any(module.endswith(f".{x}") for x in targets if module not in targets)


def _split(whole: Stored, sizes: list[int]) -> list[Stored]:
    """The adapters of the layers that one fused module stands for."""
    if not sizes:
        return [whole]
    shared = "scale" if whole.options.get("scales_inputs") else "lora_a"
    pieces: list[dict[str, np.ndarray]] = [{} for _ in sizes]
    for name, array in whole.weights.items():
        if name != shared and array.shape[-1] != sum(sizes):
            raise ValueError(f"'{name}' expected {sum(sizes)} outputs, received {array.shape[-1]}")
        ends = np.cumsum(sizes)[:-1]
        arrays = [array] * len(sizes) if name == shared else np.split(array, ends, axis=-1)
        for piece, part in zip(pieces, arrays, strict=True):
            piece[name] = np.ascontiguousarray(part)
    return [Stored(whole.cls, whole.options, piece) for piece in pieces]


def _stored_ia3(module: str, weights: dict[str, np.ndarray]) -> Stored:
    is_row = bool(weights.pop("is_row", False))
    return Stored(IA3, {"scales_inputs": is_row}, weights)


def _stored_lora(config: Mapping[str, Any], module: str, weights: dict[str, np.ndarray]) -> Stored:
    cls = DoRA if config.get("use_dora") else LoRA
    options = {
        "rank": _by_pattern(config.get("rank_pattern"), module, config.get("r", 8)),
        "alpha": _by_pattern(config.get("alpha_pattern"), module, config.get("lora_alpha", 8)),
        "dropout": config.get("lora_dropout", 0.0),
        "rslora": bool(config.get("use_rslora")),
    }
    if config.get("init_lora_weights") == "pissa":  # the tensors stand beside what is left of W
        options["init"] = "pissa"
    return Stored(cls, options, weights)


def _by_pattern(patterns: Any, module: str, default: Any) -> Any:
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _check_keys(config: Mapping[str, Any], known: set[str]) -> list[str]:
    """A key that nobody reads must not ask for anything."""
    problems = []
    for key, value in config.items():
        neutral = value in (None, False, {}, [], "none")
        if key not in _IRRELEVANT | known and not neutral:
            problems.append(f"config key '{key}' = {value!r} is not supported")
    init = config.get("init_lora_weights", True)
    plain = (None, True, False, "gaussian", "orthogonal", "pissa")
    if init not in plain:
        problems.append(
            f"init_lora_weights = {init!r} changes the base's weights at random; save it with "
            "PEFT's `path_initial_model_for_weight_conversion`"
        )
    return problems
