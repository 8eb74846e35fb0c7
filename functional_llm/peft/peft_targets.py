"""Which modules a PEFT config means: `check_target_module_exists` in PEFT's tuners, and its kin."""

import re
from collections.abc import Iterable, Mapping
from typing import TypeAlias

from functional_llm.graph.types import JSON

_Targets: TypeAlias = str | list[str] | None


def is_target(config: JSON, module: str) -> bool:
    """Whether PEFT puts an adapter on a module."""
    if is_parameter_target(config, f"{module}.weight"):
        return True
    named = _is_named(config.get("target_modules"), module)
    if not named or _is_named(config.get("exclude_modules"), module):
        return False
    if any(re.match(rf"(^|.*\.){x}($|\..*)", module) for x in config.get("modules_to_save") or ()):
        return False
    numbers, patterns = config.get("layers_to_transform"), config.get("layers_pattern") or r"[^.]*"
    if numbers in (None, []) or not _is_suffix(config["target_modules"], module):
        return True
    patterns = [patterns] if isinstance(patterns, str) else patterns
    found = [re.match(rf"(?:^|.*?\.){x}\.(\d+)\.", module) for x in patterns]
    numbers = [numbers] if isinstance(numbers, int) else numbers
    return any(x is not None and int(x[1]) in numbers for x in found)


def is_parameter_target(config: JSON, parameter: str) -> bool:
    """Whether PEFT puts an adapter on a parameter, by its full name."""
    return _is_named(list(config.get("target_parameters") or ()), parameter)


def is_feedforward(config: JSON, module: str) -> bool:
    """Whether PEFT's IA3 scales the inputs of a module."""
    return _is_named(config.get("feedforward_modules"), module)


def pattern_key(config: JSON, module: str) -> str:
    """Returns the name by which PEFT looks for a module in patterns of ranks and alphas."""
    parameter = f"{module}.weight"
    return parameter if is_parameter_target(config, parameter) else module


def is_to_save(config: JSON, tensor: str) -> bool:
    """Whether a tensor belongs to one of the modules that PEFT copies whole."""
    parts = tensor.split(".")[:-1]
    modules = [".".join(parts[: i + 1]) for i in range(len(parts))]
    return any(x.endswith(name) for name in config.get("modules_to_save") or () for x in modules)


def _is_named(targets: _Targets, module: str) -> bool:
    """Whether `targets` names a module: a regular expression, or a list of names or their ends."""
    if isinstance(targets, str):
        return re.fullmatch(targets, module) is not None
    return module in (targets or ()) or _is_suffix(targets, module)


def _is_suffix(targets: _Targets, module: str) -> bool:
    if not isinstance(targets, list) or module in targets:
        return False
    return any(module.endswith(f".{x}") for x in targets)


def by_pattern(patterns: Mapping[str, float] | None, module: str, default: float) -> float:
    """Returns the number that a config's `rank_pattern` or `alpha_pattern` has for a module."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def numbers_of(config: JSON, key: str) -> JSON:
    """Returns rank and alpha of what PEFT calls `key` in patterns."""
    return {
        "rank": by_pattern(config.get("rank_pattern"), key, config.get("r", 8)),
        "alpha": by_pattern(config.get("alpha_pattern"), key, config.get("lora_alpha", 8)),
    }


def target_modules(modules: set[str], known: Iterable[str], parts: int = 1) -> list[str]:
    """Returns the last parts of a name if all modules that end in them are meant, else full names.

    A number alone would name decoder layers, too, whose names end in theirs.

    Args:
        modules: Those meant.
        known: All.
        parts: How many parts.
    """

    def end(name: str) -> str:
        return ".".join(name.split(".")[-parts:])

    known, targets = set(known), []
    for last in sorted(set(map(end, modules))):
        same = {name for name in known if end(name) == last}
        is_enough = same <= modules and not last.isdigit()
        targets += [last] if is_enough else sorted(same & modules)
    return targets
