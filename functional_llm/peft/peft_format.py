"""PEFT's own files for the methods it knows: their config and the names of their tensors.

Shapes: R rank. PEFT keeps matrices as torch does, (out, in).
"""

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from keras import ops

from functional_llm.graph.types import JSON, Tensor
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

_Targets: TypeAlias = str | list[str] | None


@dataclass(frozen=True)
class SavedAdapter:
    """One layer's adapter in a file: how to make it, and its weights by the adapter's own names."""

    cls: type[Adapter]
    options: JSON
    weights: dict[str, np.ndarray]


# To PEFT


def to_peft(
    adapters: Mapping[str, Adapter],
    module_of: Mapping[str, str],
    linear_at: Callable[[str], Linear],
) -> tuple[JSON, dict[str, np.ndarray]]:
    """Returns the config and the tensors of an adapter in PEFT's format.

    Args:
        adapters: Path -> adapter, all of one class that PEFT knows.
        module_of: Path -> name of the module; a fused module has several paths, in order.
        linear_at: Path -> the layer of the model.
    """
    modules = {
        module: _join([adapters.get(path) for path in paths], paths, linear_at)
        for module, paths in _group_paths(module_of).items()
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
        "target_modules": _target_modules(set(modules), module_of.values()),
    }
    if isinstance(first, IA3):
        scaled = {m for m, x in modules.items() if x.tensors["ia3_l"].shape[0] == 1}
        config |= {"feedforward_modules": _target_modules(scaled, module_of.values())}
    else:
        config |= _lora_config(modules, first)
    tensors = {
        f"{PREFIX}{module}.{suffix}": np.ascontiguousarray(array)
        for module, joined in modules.items()
        for suffix, array in joined.tensors.items()
    }
    return config, tensors


@dataclass(frozen=True)
class _ModuleTensors:
    """What a file has for one module: tensors by PEFT's suffixes, and the scale of LoRA."""

    tensors: dict[str, np.ndarray]
    scale: float = 1.0

    @property
    def rank(self) -> int:
        return self.tensors["lora_A.weight"].shape[0]


def _group_paths(module_of: Mapping[str, str]) -> dict[str, list[str]]:
    """Returns module -> its paths."""
    paths_of: dict[str, list[str]] = {}
    for path, module in module_of.items():
        paths_of.setdefault(module, []).append(path)
    return paths_of


def _join(
    adapters: Sequence[Adapter | None], paths: list[str], linear_at: Callable[[str], Linear]
) -> _ModuleTensors:
    """Makes one adapter for the outputs of several layers side by side (or of one)."""
    present = [x for x in adapters if x is not None]
    if isinstance(present[0], IA3):
        return _ModuleTensors({"ia3_l": _join_ia3(adapters, paths, linear_at)})
    scale = present[0].scale
    factors = [None if x is None else [_to_numpy(f) for f in x.factors()] for x in adapters]
    a = np.concatenate([f[0] for f in factors if f is not None], axis=1)
    sizes = [1] if len(paths) == 1 else [linear_at(path).out_size for path in paths]
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
            column_lengths(linear_at(path).kernel()) if x is None else x.magnitude
            for path, x in zip(paths, adapters, strict=True)
        ]
        tensors["lora_magnitude_vector"] = np.concatenate([_to_numpy(x) for x in lengths])
    return _ModuleTensors(tensors, scale)


def _join_ia3(
    adapters: Sequence[Adapter | None], paths: list[str], linear_at: Callable[[str], Linear]
) -> np.ndarray:
    present = [x for x in adapters if x is not None]
    if not any(x.scales_inputs for x in present):
        scales = [
            np.ones(linear_at(path).out_size, "float32") if x is None else _to_numpy(x.scale)
            for path, x in zip(paths, adapters, strict=True)
        ]
        return np.concatenate(scales)[:, None]
    if len(paths) > 1:
        raise ValueError(
            f"PEFT's files keep {paths} as one module, whose inputs cannot be scaled one by one. "
            "Leave them out of `feedforward`."
        )
    return _to_numpy(present[0].scale)[None, :]


def _lora_config(modules: Mapping[str, _ModuleTensors], first: Adapter) -> JSON:
    ranks = {m: x.rank for m, x in modules.items()}
    # PiSSA and fused modules raise the rank, and the scale stays.
    alphas = {m: x.scale * (x.rank**0.5 if first.rslora else x.rank) for m, x in modules.items()}
    rank, alpha = (Counter(v.values()).most_common(1)[0][0] for v in (ranks, alphas))
    return {
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": first.dropout,
        "rank_pattern": {m: r for m, r in ranks.items() if r != rank},
        "alpha_pattern": {m: a for m, a in alphas.items() if a != alpha},
        "use_rslora": first.rslora,
        "use_dora": isinstance(first, DoRA),
        "init_lora_weights": True,
        "bias": "none",
    }


def _target_modules(modules: set[str], known: Iterable[str]) -> list[str]:
    """Returns the last name if all modules that end in it are meant, else full names."""
    known, targets = set(known), []
    for last in sorted({name.rpartition(".")[2] for name in modules}):
        same = {name for name in known if name.rpartition(".")[2] == last}
        targets += [last] if same <= modules else sorted(same & modules)
    return targets


def _to_numpy(x: Tensor) -> np.ndarray:
    return np.asarray(ops.convert_to_numpy(ops.cast(x, "float32")))


# From PEFT

# What a tensor's name ends in -> the adapter's own name of the weight.
_WEIGHT_OF_SUFFIX = {
    "lora_A.weight": "lora_a",
    "lora_B.weight": "lora_b",
    "lora_magnitude_vector": "magnitude",
    "ia3_l": "scale",
}


def from_peft(
    config: JSON,
    tensors: Mapping[str, np.ndarray],
    module_of: Mapping[str, str],
    linear_at: Callable[[str], Linear],
) -> tuple[dict[str, SavedAdapter], list[str]]:
    """Reads an adapter in PEFT's format.

    Args:
        config: The `adapter_config.json`.
        tensors: The file's tensors.
        module_of: Path -> name of the module; a fused module has several paths, in order.
        linear_at: Path -> the layer of the model.

    Returns:
        Path -> what the file has for it, and what does not fit.
    """
    is_lora = config.get("peft_type") == "LORA"
    paths_of = _group_paths(module_of)
    grouped, tensor_problems = _group_tensors(tensors, paths_of)
    problems = _check_keys(config, _LORA_KEYS if is_lora else _IA3_KEYS) + tensor_problems
    problems += [
        f"module '{module}' is one of the adapter's targets, and has no tensors"
        for module in paths_of
        if module not in grouped and _is_target(config, module)
    ]
    saved: dict[str, SavedAdapter] = {}
    for module, found in grouped.items():
        whole = _read_lora(config, module, found) if is_lora else _read_ia3(found)
        paths = paths_of[module]
        try:
            pieces = _split(whole, [linear_at(x).out_size for x in paths] if paths[1:] else [])
        except ValueError as error:
            problems.append(f"module '{module}': {error}")
            continue
        saved |= dict(zip(paths, pieces, strict=True))
    return saved, problems


def _group_tensors(
    tensors: Mapping[str, np.ndarray], modules: Collection[str]
) -> tuple[dict[str, dict[str, np.ndarray]], list[str]]:
    """Returns module -> suffix -> tensor, and what does not fit."""
    grouped: dict[str, dict[str, np.ndarray]] = {}
    problems = []
    for name, array in tensors.items():
        suffix = next((x for x in _WEIGHT_OF_SUFFIX if name.endswith(f".{x}")), None)
        if not name.startswith(PREFIX) or suffix is None:
            problems.append(f"unknown tensor '{name}' of shape {array.shape}")
            continue
        module = name.removeprefix(PREFIX).removesuffix(f".{suffix}")
        if module in modules:
            grouped.setdefault(module, {})[suffix] = array
        else:
            problems.append(f"the model has no module '{module}'")
    return grouped, list(dict.fromkeys(problems))


def _is_target(config: JSON, module: str) -> bool:
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


def _is_named(targets: _Targets, module: str) -> bool:
    """Whether `targets` names a module: a regular expression, or a list of names or their ends."""
    if isinstance(targets, str):
        return re.fullmatch(targets, module) is not None
    return module in (targets or ()) or _is_suffix(targets, module)


def _is_suffix(targets: _Targets, module: str) -> bool:
    if not isinstance(targets, list) or module in targets:
        return False
    return any(module.endswith(f".{x}") for x in targets)


def _read_lora(config: JSON, module: str, tensors: Mapping[str, np.ndarray]) -> SavedAdapter:
    cls = DoRA if config.get("use_dora") else LoRA
    options = {
        "rank": _by_pattern(config.get("rank_pattern"), module, config.get("r", 8)),
        "alpha": _by_pattern(config.get("alpha_pattern"), module, config.get("lora_alpha", 8)),
        "dropout": config.get("lora_dropout", 0.0),
        "rslora": bool(config.get("use_rslora")),
    }
    if config.get("init_lora_weights") == "pissa":  # the tensors stand beside what is left of W
        options["init"] = "pissa"
    return SavedAdapter(cls, options, _own_weights(tensors))


def _read_ia3(tensors: Mapping[str, np.ndarray]) -> SavedAdapter:
    scale = tensors.get("ia3_l")
    scales_inputs = scale is not None and scale.ndim == 2 and scale.shape[0] == 1
    return SavedAdapter(IA3, {"scales_inputs": scales_inputs}, _own_weights(tensors))


def _own_weights(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the tensors under the adapter's own names, in its layout."""
    return {
        _WEIGHT_OF_SUFFIX[suffix]: array.T if suffix.endswith("weight") else array.reshape(-1)
        for suffix, array in tensors.items()
    }


def _split(whole: SavedAdapter, sizes: list[int]) -> list[SavedAdapter]:
    """Returns the adapters of the layers that one fused module stands for.

    Args:
        whole: The module's.
        sizes: Outputs of each layer; empty if the module stands for one layer.
    """
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
    return [SavedAdapter(whole.cls, whole.options, piece) for piece in pieces]


def _by_pattern(patterns: dict[str, float] | None, module: str, default: float) -> float:
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _check_keys(config: JSON, known: set[str]) -> list[str]:
    """Returns a line for each key that asks for something and that nobody reads."""
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
