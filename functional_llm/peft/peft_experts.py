"""PEFT's files for LoRA on what is a parameter of Transformers' model, not the weight of a Linear.

Experts are parameters (E, out, in) there, gate and up in one; a router is one, too. PEFT calls them
`target_parameters`. Those of one module are wrapped one in the other, in the order in which the
module has them, so the last one's tensors have the name of the module, and those of the one before
it have `.base_layer` behind. A is (E * R, in) and B is (out, R * E): the experts are the outer axis
of the one and the inner axis of the other.

Files from before PEFT 0.19.1 or Transformers 5 are read, too: A and B stood the other way round, or
every expert was a Linear of its own.

Shapes: E experts, R rank.
"""

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import TypeAlias

import numpy as np

from functional_llm.graph.types import JSON
from functional_llm.peft.names import NamedModel
from functional_llm.peft.peft_targets import is_parameter_target, is_target, numbers_of

# What PEFT takes for experts in the `target_modules` of a model that has some, wherever it stands.
_TAKEN_FOR_EXPERTS = {"gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"}
LAYOUT_VERSION = "0.19.1"  # the first PEFT with this layout
_FACTORS = ("lora_A.weight", "lora_B.weight")

Factors: TypeAlias = dict[str, np.ndarray]  # lora_a (E, in, R) and lora_b (E, R, out)


def is_parameter(module: str, model: NamedModel) -> bool:
    """Whether PEFT reaches a module's weight as one of its `target_parameters` only."""
    if module in model.parameters:
        return True
    has_experts = any(model.experts_of(x) for x in model.parameters)
    return has_experts and module.rpartition(".")[2] in _TAKEN_FOR_EXPERTS


def parameter_name(module: str, model: NamedModel) -> str:
    """Returns what PEFT calls the weight of a module."""
    return module if model.experts_of(module) else f"{module}.weight"


def wrapper_names(targets: set[str], model: NamedModel) -> dict[str, str]:
    """Returns name of experts' parameter -> the module that holds its A and B in a file.

    Args:
        targets: Those that have an adapter.
        model: The model.
    """
    inside: dict[str, list[str]] = defaultdict(list)
    for module in model.parameters:
        if module in targets and model.experts_of(module):
            inside[module.rpartition(".")[0]].append(module)
    return {
        module: holder + ".base_layer" * (len(modules) - 1 - i)
        for holder, modules in inside.items()
        for i, module in enumerate(modules)
    }


def factors_to_peft(a: np.ndarray, b: np.ndarray, module: str, model: NamedModel) -> Factors:
    """Returns A and B of experts (E, in, R) and (E, R, out) as PEFT's matrices, by their names."""
    first, second = a.swapaxes(1, 2), b.swapaxes(1, 2)  # (E, R, in), (E, out, R)
    if not model.a_is_of_inputs(module, model.names.inputs_first):
        first, second = second.swapaxes(1, 2), first.swapaxes(1, 2)
    matrices = (
        first.reshape(-1, first.shape[2]),
        second.transpose(1, 2, 0).reshape(second.shape[1], -1),
    )
    return dict(zip(_FACTORS, matrices, strict=True))


def factors_from_peft(
    config: JSON, tensors: Mapping[str, np.ndarray], prefix: str, model: NamedModel
) -> tuple[list[tuple[str, Factors, JSON]], set[str], list[str]]:
    """Reads the experts of a file.

    Args:
        config: The `adapter_config.json`.
        tensors: The file's tensors.
        prefix: Before all names in the file.
        model: The model.

    Returns:
        Parameter, or path of a layer, with its factors and its rank and alpha; the names of the
        tensors that were read; and what does not fit.
    """
    found, problems = [], []
    targets = {x for x in model.parameters if is_parameter_target(config, x)}
    read: set[str] = set()
    for module, wrapper in wrapper_names(targets, model).items():
        names = [f"{prefix}{wrapper}.{x}" for x in _FACTORS]
        read.update(names)
        if missing := [x for x in names if x not in tensors]:
            problems += [f"parameter '{module}' has no tensor '{x}'" for x in missing]
            continue
        numbers = numbers_of(config, module)
        try:
            factors = _unstack(config, tensors[names[0]], tensors[names[1]], module, numbers, model)
        except ValueError as error:
            problems.append(str(error))
            continue
        found.append((module, factors, numbers))
    for path, modules in _modules_of_experts(model):
        pairs = [[f"{prefix}{module}.{x}" for x in _FACTORS] for module in modules]
        if not any(x in tensors for pair in pairs for x in pair):
            continue
        read.update(x for pair in pairs for x in pair)
        try:
            found.append((path, *_stack(config, tensors, modules, pairs)))
        except ValueError as error:
            problems.append(f"the experts at '{path}': {error}")
    return found, read & set(tensors), problems


def _unstack(
    config: JSON, a: np.ndarray, b: np.ndarray, module: str, numbers: JSON, model: NamedModel
) -> Factors:
    experts, rank = model.experts_of(module), numbers["rank"]
    (count,), sizes = experts[0].stack, (experts[0].in_size, sum(x.out_size for x in experts))
    of_inputs = model.a_is_of_inputs(module, _inputs_first(config, model.names.inputs_first))
    first, second = sizes if of_inputs else sizes[::-1]
    expected = (count * rank, first), (second, rank * count)
    if (a.shape, b.shape) != expected:
        raise ValueError(
            f"parameter '{module}': expected A and B of {count} experts of rank {rank}, of shapes "
            f"{expected[0]} and {expected[1]}, received {a.shape} and {b.shape}"
        )
    a_of_each = a.reshape(count, rank, first)
    b_of_each = b.reshape(second, rank, count).transpose(2, 1, 0)  # (E, R, out)
    if not of_inputs:
        a_of_each, b_of_each = b_of_each, a_of_each
    return {"lora_a": a_of_each.swapaxes(1, 2), "lora_b": b_of_each}


def _inputs_first(config: JSON, is_so: bool) -> bool:
    """Returns what the PEFT that wrote a file believed of matrices of experts that `is_so`."""
    found = re.match(r"(\d+)\.(\d+)\.(\d+)", str(config.get("peft_version")))
    version = ".".join(found.groups()) if found else "0.17.0"  # which did not say it
    if _numbers(version) >= _numbers(LAYOUT_VERSION):
        return is_so
    return not is_so if version == "0.19.0" else True


def _numbers(version: str) -> list[int]:
    return [int(x) for x in version.split(".")]


def _modules_of_experts(model: NamedModel) -> Iterator[tuple[str, list[str]]]:
    """Yields the path of a layer of experts, and the Linear that each was before Transformers 5."""
    modules: dict[str, list[str]] = defaultdict(list)
    for tensor in model.names.tensors:
        path, _, kind = tensor.paths[0].rpartition("/")
        if tensor.entry is not None and kind == "kernel" and len(tensor.paths) == 1:
            modules[path].append(tensor.name.removesuffix(".weight"))
    yield from modules.items()


def _stack(
    config: JSON, tensors: Mapping[str, np.ndarray], modules: list[str], names: list[list[str]]
) -> tuple[Factors, JSON]:
    numbers: list[JSON] = []
    pairs: list[list[np.ndarray] | None] = []
    for module, pair in zip(modules, names, strict=True):
        if not all(x in tensors for x in pair):
            if any(x in tensors for x in pair) or is_target(config, module):
                raise ValueError(f"module '{module}' is one of its targets, and has no tensors")
            pairs.append(None)  # an adapter of some experts
            continue
        numbers.append(numbers_of(config, module))
        pairs.append([tensors[x].T for x in pair])
    given = [pair for pair in pairs if pair is not None]
    shapes = sorted({tuple(x.shape for x in pair) for pair in given})
    if len(shapes) > 1 or any(x != numbers[0] for x in numbers):
        raise ValueError(
            f"expected one rank, one alpha and one shape, received A and B of shapes {shapes}"
        )
    factors = [
        np.stack([np.zeros(shape, "float32") if pair is None else pair[i] for pair in pairs])
        for i, shape in enumerate(shapes[0])
    ]
    return dict(zip(("lora_a", "lora_b"), factors, strict=True)), numbers[0]
