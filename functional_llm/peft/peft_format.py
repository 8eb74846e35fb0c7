"""PEFT's own files for the methods it knows: their config and the names of their tensors.

Shapes: R rank. PEFT keeps matrices as torch does, (out, in).
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from keras import ops

from functional_llm.peft.adapter import Adapter
from functional_llm.peft.dora import DoRA
from functional_llm.peft.ia3 import IA3
from functional_llm.peft.lora import LoRA

PREFIX = "base_model.model."

# Keys of an adapter_config.json that say nothing about what the adapter computes.
_IRRELEVANT = {
    *("task_type", "peft_type", "base_model_name_or_path", "revision", "inference_mode"),
    *("auto_mapping", "peft_version", "target_modules", "exclude_modules", "layers_to_transform"),
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
    adapters: Mapping[str, Adapter], names: Mapping[str, str]
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Returns the config and the tensors of an adapter in PEFT's format.

    Args:
        adapters: Path -> adapter, all of one class that PEFT knows.
        names: Path -> name of the module.
    """
    modules = {names[path]: adapter for path, adapter in adapters.items()}
    first = next(iter(adapters.values()))
    config = {
        "peft_type": first.peft_type,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "inference_mode": True,
        "fan_in_fan_out": False,
        "modules_to_save": None,
        "target_modules": _target_modules(modules, names.values()),
    }
    if isinstance(first, IA3):
        scaled = {m: x for m, x in modules.items() if isinstance(x, IA3) and x.scales_inputs}
        config |= {"feedforward_modules": _target_modules(scaled, names.values())}
    else:
        config |= _lora_config(modules)
    tensors = {
        f"{PREFIX}{module}.{name}": np.ascontiguousarray(array)
        for module, adapter in modules.items()
        for name, array in _tensors(adapter).items()
    }
    return config, tensors


def _lora_config(modules: Mapping[str, Any]) -> dict[str, Any]:
    factors = {m: _array(x.factors()[0]).shape[1] for m, x in modules.items()}
    # With PiSSA the rank is twice that of training, and the scale stays.
    alphas = {m: _alpha_for(x, factors[m]) for m, x in modules.items()}
    rank, alpha = (Counter(v.values()).most_common(1)[0][0] for v in (factors, alphas))
    first = next(iter(modules.values()))
    return {
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": first.dropout_rate,
        "rank_pattern": {m: r for m, r in factors.items() if r != rank},
        "alpha_pattern": {m: a for m, a in alphas.items() if a != alpha},
        "use_rslora": first.rslora,
        "use_dora": isinstance(first, DoRA),
        "init_lora_weights": True,
        "bias": "none",
    }


def _alpha_for(adapter: Any, rank: int) -> float:
    if rank == adapter.rank:
        return adapter.alpha
    return adapter.scale * (rank**0.5 if adapter.rslora else rank)


def _target_modules(modules: Mapping[str, Any], known: Any) -> list[str]:
    """Last names where all modules of that name are meant, else full names."""
    last = sorted({name.rpartition(".")[2] for name in modules})
    ends = {x: {name for name in known if name.rpartition(".")[2] == x} for x in last}
    # `known` may have layers that this model leaves out (a head that is tied): no harm.
    return [
        name
        for x in last
        for name in ([x] if ends[x] <= set(modules) else sorted(ends[x]))
        if name == x or name in modules
    ]


def _tensors(adapter: Any) -> dict[str, np.ndarray]:
    if isinstance(adapter, IA3):
        scale = _array(adapter.scale)
        return {"ia3_l": scale[None, :] if adapter.scales_inputs else scale[:, None]}
    a, b = map(_array, adapter.factors())
    tensors = {"lora_A.weight": a.T, "lora_B.weight": b.T}
    if isinstance(adapter, DoRA):
        tensors["lora_magnitude_vector"] = _array(adapter.magnitude)
    return tensors


def _array(x: Any) -> np.ndarray:
    return np.asarray(ops.convert_to_numpy(ops.cast(x, "float32")))


_SUFFIXES = {
    "lora_A.weight": "lora_a",
    "lora_B.weight": "lora_b",
    "lora_magnitude_vector": "magnitude",
    "ia3_l": "scale",
}


def from_peft(
    config: Mapping[str, Any], tensors: Mapping[str, np.ndarray], names: Mapping[str, str]
) -> tuple[dict[str, Stored], list[str]]:
    """Reads an adapter in PEFT's format.

    Args:
        config: The `adapter_config.json`.
        tensors: The file's tensors.
        names: Path -> name of the module.

    Returns:
        Path -> what is stored for it, and what does not fit.
    """
    kind = config.get("peft_type")
    problems = _check_keys(config, _LORA_KEYS if kind == "LORA" else _IA3_KEYS)
    paths = {name: path for path, name in names.items()}
    grouped: dict[str, dict[str, np.ndarray]] = {}
    for key, array in tensors.items():
        suffix = next((x for x in _SUFFIXES if key.endswith(f".{x}")), None)
        if not key.startswith(PREFIX) or suffix is None:
            problems.append(f"unknown tensor '{key}' of shape {array.shape}")
            continue
        module = key.removeprefix(PREFIX).removesuffix(f".{suffix}")
        if module not in paths:
            problems.append(f"tensor '{key}': the model has no module '{module}'")
            continue
        own_layout = array.T if suffix.endswith("weight") else array.reshape(-1)
        grouped.setdefault(module, {})[_SUFFIXES[suffix]] = own_layout
        if suffix == "ia3_l":  # its shape tells which side it scales
            grouped[module]["is_row"] = np.array(array.ndim == 2 and array.shape[0] == 1)
    stored = {}
    for module, weights in grouped.items():
        if kind == "IA3":
            stored[paths[module]] = _stored_ia3(weights)
        else:
            stored[paths[module]] = _stored_lora(config, module, weights)
    return stored, problems


def _stored_ia3(weights: dict[str, np.ndarray]) -> Stored:
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
    import re

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
