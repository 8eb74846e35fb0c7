"""What PEFT's files hold beside a method: whole modules, biases, rows of an embedding."""

import re
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from functional_llm.formats.weight_table import Assembly
from functional_llm.graph.types import JSON
from functional_llm.peft.adapter import Adapter
from functional_llm.peft.names import NamedModel, to_numpy
from functional_llm.peft.peft_format import PREFIX
from functional_llm.peft.peft_modules import SavedAdapter
from functional_llm.peft.peft_targets import is_to_save
from functional_llm.peft.retrained import Retrained
from functional_llm.peft.tokens import TrainedTokens

_ROWS = ".token_adapter.trainable_tokens_delta"
_BASE = ".base_layer"
# PEFT leaves the name of the adapter out before a tensor of the module itself.
_WRAPPER = re.compile(r"\.modules_to_save(\.[^.]+)?\.")


def tokens_from_peft(
    config: JSON, tensors: Mapping[str, np.ndarray]
) -> tuple[JSON, dict[str, np.ndarray]]:
    """Returns config and tensors of PEFT's TRAINABLE_TOKENS as LoRA's would be, for no targets."""
    end = ".trainable_tokens_delta"
    renamed = {x.replace(end, _ROWS) if x.endswith(end) else x: t for x, t in tensors.items()}
    modules = {x.removeprefix(PREFIX).removesuffix(_ROWS) for x in renamed if x.endswith(_ROWS)}
    indices = dict.fromkeys(modules, config.get("token_indices"))
    own = {"token_indices", "init_weights", "target_modules", "exclude_modules"}
    others = {key: value for key, value in config.items() if key not in own}
    return {**others, "peft_type": "LORA", "trainable_token_indices": indices}, renamed


def values_from_peft(
    config: JSON, tensors: Mapping[str, np.ndarray], model: NamedModel
) -> tuple[list[tuple[str, SavedAdapter]], list[str]]:
    """Reads the tensors that belong to no method; returns paths and adapters, and what is wrong.

    Args:
        config: The `adapter_config.json`.
        tensors: The tensors, without PEFT's prefix.
        model: The model, and the names of its parts.
    """
    config = _with_tied(config, model)
    found: dict[tuple[str, bool | None], dict[str, np.ndarray]] = {}  # layer, direction -> weights
    saved, problems, assembly = [], [], model.assembly()
    # With `bias`, PEFT also writes what is inside its wrappers; `original_module` is not in use.
    tensors = {_WRAPPER.sub(".", x): t for x, t in tensors.items() if ".original_module." not in x}
    has_head = f"{_head(model)}{_ROWS}" in tensors
    for name, array in tensors.items():
        stem = name.replace(f"{_BASE}.", ".")
        try:
            if name.endswith(_ROWS):
                saved.append(_rows(config, name.removesuffix(_ROWS), array, model, has_head))
                continue
            for path, reverse, value in _values(config, name, stem, array, model, assembly):
                layer, _, weight = path.rpartition("/")
                found.setdefault((layer, reverse), {})[weight] = value
        except ValueError as error:
            problems.append(str(error))
    there = {name.replace(f"{_BASE}.", ".") for name in tensors}
    problems += [
        f"tensor '{x}' is of a module in modules_to_save, and is not there"
        for x in [*model.tensors, *([model.names.tied[0]] if model.names.tied else [])]
        if is_to_save(config, x) and x not in there
    ]
    for (layer, reverse), weights in found.items():
        is_whole = set(weights) == set(model.weight_names(layer))
        options: JSON = {"names": None if is_whole else sorted(weights)}
        options |= {} if reverse is False else {"reverse": reverse}
        saved.append((layer, SavedAdapter(Retrained, options, weights)))
    return saved, problems


def _with_tied(config: JSON, model: NamedModel) -> JSON:
    """Returns the config with embedding and head both to be saved, if PEFT has tied them."""
    tied = model.names.tied
    if not config.get("ensure_weight_tying") or not tied:
        return config
    if not any(is_to_save(config, x) for x in tied):
        return config
    modules = [x.removesuffix(".weight") for x in tied]
    return {**config, "modules_to_save": [*config["modules_to_save"], *modules]}


def _values(
    config: JSON,
    name: str,
    stem: str,
    array: np.ndarray,
    model: NamedModel,
    assembly: Assembly,
) -> Iterable[tuple[str, bool | None, np.ndarray]]:
    """Yields (path of a variable, direction, value) of a tensor."""
    head, table = model.names.tied or ("", "")
    is_bias = stem.endswith(".bias") and config.get("bias", "none") != "none"
    is_base = stem != name and not is_bias
    known = stem in model.tensors or stem == head
    if not known or not (is_base or is_bias or is_to_save(config, stem)):
        raise ValueError(f"unknown tensor '{PREFIX}{name}' of shape {array.shape}")
    for path, value in model.split(table if stem == head else stem, array, assembly):
        reverse: bool | None = stem == head
        if is_base:  # of the model under the adapter
            variable = model.variables[path]
            if np.array_equal(to_numpy(variable), value.astype(variable.dtype).astype("float32")):
                continue
            reverse = None if stem in (head, table) and head else False
        yield path, reverse, value


def _head(model: NamedModel) -> str:
    """Returns the module of the head that an embedding is, too; empty if there is none."""
    return "" if model.names.tied is None else model.names.tied[0].removesuffix(".weight")


def _rows(
    config: JSON, module: str, array: np.ndarray, model: NamedModel, has_head: bool
) -> tuple[str, SavedAdapter]:
    indices = config.get("trainable_token_indices")
    if isinstance(indices, Mapping):
        indices = next((x for key, x in indices.items() if module.endswith(key)), None)
    table = "" if model.names.tied is None else model.names.tied[1]
    is_head = module == _head(model)
    tensor = model.tensors.get(table if is_head else f"{module}.weight")
    is_list = isinstance(indices, list) and all(type(x) is int for x in indices)
    if not is_list or tensor is None:
        raise ValueError(
            f"tensor '{PREFIX}{module}{_ROWS}' expected token ids for a module of the model in "
            "the config key 'trainable_token_indices'"
        )
    options: JSON = {"token_ids": indices}
    if tensor.name == table:  # the head follows, unless it has rows of its own
        options["reverse"] = True if is_head else False if has_head else None
    path = tensor.paths[0].rpartition("/")[0]
    return path, SavedAdapter(TrainedTokens, options, {"rows": array})


def values_to_peft(
    adapters: Sequence[tuple[str, Adapter]], config: JSON, targets: set[str], model: NamedModel
) -> dict[str, np.ndarray]:
    """Returns the tensors of what is beside a method, and writes its keys into the config.

    Args:
        adapters: Path and adapter of each layer.
        config: The `adapter_config.json`, changed.
        targets: Modules of the method.
        model: The model, and the names of its parts.

    Raises:
        ValueError: If PEFT has no such thing beside the method.
    """
    head, table = model.names.tied or ("", "")
    values: dict[bool, dict[str, np.ndarray]] = {False: {}, True: {}}
    indices, tensors = {}, {}
    for path, adapter in adapters:
        own = {name: to_numpy(v) for name, v in adapter.adapter_weights.items()}
        if isinstance(adapter, TrainedTokens):
            name = next(x for x, t in model.tensors.items() if t.paths[0].startswith(f"{path}/"))
            module = _head(model) if adapter.reverse else name.removesuffix(".weight")
            indices[module] = [int(x) for x in adapter.token_ids]
            tensors[f"{module}{_ROWS}"] = own["rows"]
            continue
        for reverse in (False, True):
            if adapter.changes(reverse):
                values[reverse] |= {f"{path}/{name}": x for name, x in own.items()}
    names = {x: t for x, t in model.tensors.items() if any(p in values[False] for p in t.paths)}
    whole = {x: model.join(x, values[False]) for x in names}
    if values[True]:
        whole[head] = model.join(table, values[True])
    loose = _loose_biases(set(whole), config, targets, model)
    modules = {x.rpartition(".")[0] for x in whole if x not in loose} - targets
    config["modules_to_save"] = sorted(modules) or None
    siblings = [x for x in model.tensors if x.rpartition(".")[0] in modules]
    whole |= {x: model.join(x, {}) for x in siblings if x not in whole}
    if indices and config["peft_type"] != "LORA":
        raise ValueError(
            "PEFT's files have tokens that train only beside LoRA: give those of `train_tokens` an "
            "`adapter_name` of their own."
        )
    if indices:
        config["trainable_token_indices"] = indices
    for name, array in whole.items():
        module, _, kind = name.rpartition(".")
        inside = _BASE if module in targets else ""
        tensors[f"{module}{inside}.{kind}"] = array
    return {f"{PREFIX}{name}": np.ascontiguousarray(x) for name, x in tensors.items()}


def _loose_biases(
    retrained: set[str], config: JSON, targets: set[str], model: NamedModel
) -> set[str]:
    """Returns the biases that train alone, if PEFT's `bias` says which; writes that key, too."""
    if config["peft_type"] != "LORA":
        return set()
    biases = {x for x in retrained if x.endswith(".bias")}
    alone = {x for x in biases if f"{x.removesuffix('.bias')}.weight" not in retrained}
    known = {x for x in model.tensors if x.endswith(".bias")}
    if biases and biases == known:
        config["bias"] = "all"
    elif alone and alone == {x for x in known if x.removesuffix(".bias") in targets}:
        config["bias"] = "lora_only"
    else:
        return set()
    return alone
