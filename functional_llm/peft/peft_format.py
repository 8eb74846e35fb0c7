"""PEFT's own files for the methods it knows: their config and the names of their tensors.

Shapes: R rank. PEFT keeps matrices as torch does, (out, in).
"""

import warnings
from collections import Counter
from collections.abc import Mapping

import numpy as np

from functional_llm.graph.types import JSON
from functional_llm.peft.adapter import Adapter
from functional_llm.peft.dora import DoRA
from functional_llm.peft.ia3 import IA3
from functional_llm.peft.lora import LoRA
from functional_llm.peft.names import NamedModel
from functional_llm.peft.peft_experts import (
    LAYOUT_VERSION,
    factors_from_peft,
    is_parameter,
    parameter_name,
    wrapper_names,
)
from functional_llm.peft.peft_modules import (
    CONVERT,
    EMBEDDING_FACTORS,
    FACTORS,
    ModuleTensors,
    SavedAdapter,
    join_adapters,
    split_adapter,
)
from functional_llm.peft.peft_targets import (
    is_feedforward,
    is_target,
    numbers_of,
    pattern_key,
    target_modules,
)

PREFIX = "base_model.model."

# Keys of an adapter_config.json that say nothing about what the adapter computes.
_IRRELEVANT = {
    *("task_type", "peft_type", "base_model_name_or_path", "revision", "inference_mode"),
    *("auto_mapping", "peft_version", "target_modules", "exclude_modules", "layers_to_transform"),
    *("fan_in_fan_out",),  # how the base keeps its matrices; the tensors are the same
    *("layers_pattern", "runtime_config", "megatron_core", "qalora_group_size"),
    *("modules_to_save", "ensure_weight_tying"),  # tensors of both are in the file
    # How A and B came to be: `init_lora_weights` says whether the base was changed for that.
    *("eva_config", "corda_config", "lora_ga_config", "loftq_config"),
}
_LORA_KEYS = {"r", "lora_alpha", "lora_dropout", "rank_pattern", "alpha_pattern", "bias"}
_LORA_KEYS |= {"use_rslora", "use_dora", "init_lora_weights", "trainable_token_indices"}
_LORA_KEYS |= {"lora_bias", "target_parameters"}
_IA3_KEYS = {"feedforward_modules", "init_ia3_weights"}
# `init_lora_weights` with which the base stays as it was; those that take a part of it away, which
# can be found again; and the others.
_PLAIN = (None, True, False, "gaussian", "eva", "orthogonal", "mica", "true", "false")
_PART_OF_BASE = ("pissa", "olora")


# To PEFT


def to_peft(
    adapters: Mapping[str, Adapter], model: NamedModel
) -> tuple[JSON, dict[str, np.ndarray]]:
    """Returns the config and the tensors of an adapter in PEFT's format.

    Args:
        adapters: Path, with ":reverse" behind if it is that of a head, -> adapter, all of one
            class that PEFT knows.
        model: The model, and the names of its parts.
    """
    modules = {
        module: join_adapters([adapters.get(path) for path in paths], paths, module, model)
        for module, paths in model.paths_of.items()
        if any(path in adapters for path in paths)
    }
    first = next(iter(adapters.values()))
    config = {
        "peft_type": first.peft_type,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": model.names.base,
        "revision": model.names.revision,
        "inference_mode": True,
        "fan_in_fan_out": False,
        "modules_to_save": None,
        **_targets(set(modules), model, as_parameters=isinstance(first, LoRA)),
    }
    if isinstance(first, IA3):
        scaled = {m for m, x in modules.items() if x.tensors["ia3_l"].shape[0] == 1}
        config |= {"feedforward_modules": target_modules(scaled, model.paths_of)}
    else:
        config |= _lora_config(modules, first, model, config)
    wrappers = wrapper_names(set(modules), model)
    tensors = {
        f"{PREFIX}{wrappers.get(module, module)}.{suffix}": np.ascontiguousarray(array)
        for module, joined in modules.items()
        for suffix, array in joined.tensors.items()
    }
    return config, tensors


def _targets(modules: set[str], model: NamedModel, as_parameters: bool) -> JSON:
    parameters = {x for x in modules if as_parameters and is_parameter(x, model)}
    names = {parameter_name(x, model) for x in parameters}
    known = [parameter_name(x, model) for x in model.paths_of]
    targets: JSON = {"target_modules": target_modules(modules - parameters, model.paths_of)}
    if names:
        targets["target_parameters"] = target_modules(names, known, parts=3)
        targets["peft_version"] = LAYOUT_VERSION
    return targets


def why_not_peft(adapters: Mapping[str, Adapter], model: NamedModel) -> str | None:
    """Returns why PEFT has no such adapter; `None` if it has.

    Args:
        adapters: As for `to_peft`.
        model: As for `to_peft`.
    """
    first = next(iter(adapters.values()))
    if first.peft_type is None:
        return "a method that PEFT does not know"
    modules = {model.modules[path] for path in adapters}
    unnamed = [x for x in adapters.values() if x.linear is not None and x.linear.stack]
    if unnamed and not model.parameters:
        return "experts, of which the model has no names in Transformers"
    if isinstance(first, DoRA) and any(is_parameter(x, model) for x in modules):
        return "DoRA on what PEFT reaches as parameters only, where it has LoRA alone"
    if isinstance(first, IA3) and modules & set(model.parameters):
        return "IA3 on routers"
    return None


def _lora_config(
    modules: Mapping[str, ModuleTensors], first: LoRA, model: NamedModel, targets: JSON
) -> JSON:
    keys = {m: parameter_name(m, model) if is_parameter(m, model) else m for m in modules}
    ranks = {keys[m]: x.rank for m, x in modules.items()}
    # PiSSA and fused modules raise the rank, and the scale stays.
    alphas = {
        keys[m]: x.scale * (x.rank**0.5 if first.rslora else x.rank) for m, x in modules.items()
    }
    keeps_dropout = not (first.dropout and "target_parameters" in targets)
    if not keeps_dropout:
        warnings.warn(
            f"lora_dropout is 0 in the file, and {first.dropout} here: PEFT has none beside "
            "target_parameters, which it reaches experts by.",
            stacklevel=4,
        )
    rank, alpha = (Counter(v.values()).most_common(1)[0][0] for v in (ranks, alphas))
    return {
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": first.dropout if keeps_dropout else 0.0,
        "rank_pattern": {m: r for m, r in ranks.items() if r != rank},
        "alpha_pattern": {m: a for m, a in alphas.items() if a != alpha},
        "use_rslora": first.rslora,
        "use_dora": isinstance(first, DoRA),
        "init_lora_weights": True,
        "bias": "none",
    }


# From PEFT

_MATRICES = {*FACTORS, *EMBEDDING_FACTORS}
# What a tensor's name ends in -> the adapter's own name of the weight.
_WEIGHT_OF_SUFFIX = {
    **dict(zip(FACTORS, ("lora_a", "lora_b"), strict=True)),
    **dict(zip(EMBEDDING_FACTORS, ("lora_a", "lora_b"), strict=True)),
    "lora_magnitude_vector": "magnitude",
    "ia3_l": "scale",
}


def from_peft(
    config: JSON, tensors: Mapping[str, np.ndarray], model: NamedModel
) -> tuple[list[tuple[str, SavedAdapter]], dict[str, np.ndarray], list[str]]:
    """Reads the part of an adapter in PEFT's format that is one of its methods.

    Args:
        config: The `adapter_config.json`.
        tensors: The file's tensors.
        model: The model, and the names of its parts.

    Returns:
        Path and adapter of each layer; the tensors that belong to none, without their prefix; and
        what does not fit.
    """
    is_lora = config.get("peft_type") == "LORA"
    problems = _check_keys(config, _LORA_KEYS if is_lora else _IA3_KEYS)
    if problems:
        return [], {}, problems
    saved, read, problems = _read_experts(config, tensors, model) if is_lora else ([], set(), [])
    grouped, others, more = _group_tensors(
        {name: x for name, x in tensors.items() if name not in read}, model
    )
    problems += more
    problems += [
        f"module '{module}' is one of the adapter's targets, and has no tensors"
        for module in model.paths_of
        if module not in grouped and is_target(config, module)
    ]
    for module, found in grouped.items():
        read_one = _read_lora if is_lora else _read_ia3
        whole = read_one(config, module, found)
        paths = model.paths_of[module]
        try:
            saved += [x.at(path) for path, x in split_adapter(whole, module, paths, model)]
        except ValueError as error:
            problems.append(f"module '{module}': {error}")
    return saved, others, problems


def _read_experts(
    config: JSON, tensors: Mapping[str, np.ndarray], model: NamedModel
) -> tuple[list[tuple[str, SavedAdapter]], set[str], list[str]]:
    """Returns path and adapter of each layer of experts, the names read, and what does not fit."""
    found, read, problems = factors_from_peft(config, tensors, PREFIX, model)
    cls, options = _lora_options(config)
    if read and (cls is DoRA or options.get("init")):
        problems.append(
            "the adapter has experts: expected plain LoRA, received use_dora = "
            f"{config.get('use_dora')!r} and init_lora_weights = "
            f"{config.get('init_lora_weights')!r:.200}"
        )
    saved = []
    for name, factors, numbers in found:
        paths = model.paths_of.get(name, [name])
        whole = SavedAdapter(cls, {**options, **numbers}, factors)
        saved += split_adapter(whole, name, paths, model)
    return saved, read, problems


def _group_tensors(
    tensors: Mapping[str, np.ndarray], model: NamedModel
) -> tuple[dict[str, dict[str, np.ndarray]], dict[str, np.ndarray], list[str]]:
    """Returns module -> suffix -> tensor, the other tensors, and what does not fit."""
    grouped: dict[str, dict[str, np.ndarray]] = {}
    others, problems = {}, []
    for name, array in tensors.items():
        suffix = next((x for x in _WEIGHT_OF_SUFFIX if name.endswith(f".{x}")), None)
        if not name.startswith(PREFIX):
            problems.append(f"unknown tensor '{name}' of shape {array.shape}")
        elif suffix is None:
            others[name.removeprefix(PREFIX)] = array
        elif (module := name.removeprefix(PREFIX).removesuffix(f".{suffix}")) in model.paths_of:
            grouped.setdefault(module, {})[suffix] = array
        else:
            problems.append(f"the model has no module '{module}'{model.entry_of(module)}")
    return grouped, others, list(dict.fromkeys(problems))


def _read_lora(config: JSON, module: str, tensors: Mapping[str, np.ndarray]) -> SavedAdapter:
    cls, options = _lora_options(config)
    numbers = numbers_of(config, pattern_key(config, module))
    return SavedAdapter(cls, {**options, **numbers}, _own_weights(tensors))


def _lora_options(config: JSON) -> tuple[type[LoRA], JSON]:
    """Returns the class and those of its options that all layers share."""
    options = {
        "dropout": config.get("lora_dropout", 0.0),
        "rslora": bool(config.get("use_rslora")),
    }
    if config.get("init_lora_weights") in _PART_OF_BASE:  # the tensors stand beside what is left
        options["init"] = config["init_lora_weights"]
    return (DoRA if config.get("use_dora") else LoRA), options


def _read_ia3(config: JSON, module: str, tensors: Mapping[str, np.ndarray]) -> SavedAdapter:
    scale = tensors.get("ia3_l")
    scales_inputs = scale is not None and scale.ndim == 2 and scale.shape[0] == 1
    if scale is not None and scale.size == 1:  # of one output, or of one input
        scales_inputs = is_feedforward(config, module)
    return SavedAdapter(IA3, {"scales_inputs": scales_inputs}, _own_weights(tensors))


def _own_weights(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the tensors under the adapter's own names, in its layout."""
    return {
        _WEIGHT_OF_SUFFIX[suffix]: array.T if suffix in _MATRICES else array.reshape(-1)
        for suffix, array in tensors.items()
    }


def _check_keys(config: JSON, known: set[str]) -> list[str]:
    """Returns a line for each key that asks for something and that nobody reads."""
    problems = []
    if config.get("lora_bias"):
        problems.append("lora_bias = True gives B a bias, which no part here has")
    for key, value in config.items():
        neutral = value in (None, False, {}, [], "none")
        if key not in _IRRELEVANT | known and not neutral:
            problems.append(f"config key '{key}' = {value!r:.200} is not supported")
    for key, kinds in _KINDS.items():
        if key in config and not isinstance(config[key], (*kinds, type(None))):
            problems.append(f"config key '{key}' = {config[key]!r:.200} is of another type")
    if config.get("bias", "none") not in ("none", "all", "lora_only"):
        problems.append(f"config key 'bias' = {config['bias']!r:.200} is not supported")
    init = config.get("init_lora_weights", True)
    if init == "loftq":
        problems.append("init_lora_weights = 'loftq' quantises the base, which no part here does")
    elif init not in (*_PLAIN, *_PART_OF_BASE):
        problems.append(
            f"init_lora_weights = {init!r:.200} changes the base's weights in a way that is not "
            f"in the file; {CONVERT}"
        )
    return problems


_KINDS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("target_modules", "exclude_modules", "layers_pattern"), (str, list)),
    **dict.fromkeys(("modules_to_save", "target_parameters"), (list,)),
    **dict.fromkeys(("rank_pattern", "alpha_pattern"), (dict,)),
    "layers_to_transform": (int, list),
    "trainable_token_indices": (list, dict),
    **dict.fromkeys(("lora_alpha", "lora_dropout"), (int, float)),
}
