"""Which modules a PEFT config means: `check_target_module_exists` in PEFT's tuners, and its kin."""

import re
from collections.abc import Iterable, Mapping
from typing import TypeAlias

from functional_llm.graph.types import JSON

_Targets: TypeAlias = str | list[str] | None


def is_target(config: JSON, module: str) -> bool:
    """Whether PEFT puts an adapter on a module."""
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


def target_modules(modules: set[str], known: Iterable[str]) -> list[str]:
    """Returns the last name if all modules that end in it are meant, else full names."""
    known, targets = set(known), []
    for last in sorted({name.rpartition(".")[2] for name in modules}):
        same = {name for name in known if name.rpartition(".")[2] == last}
        targets += [last] if same <= modules else sorted(same & modules)
    return targets
