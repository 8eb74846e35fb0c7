"""Operations between layers, as the formula that they compute."""

import re
from collections.abc import Callable, Iterable
from typing import Any

import keras
import numpy as np
from keras import tree

from functional_llm.graph.keras_private import Call

_INFIX = {  # class -> sign, how tightly it binds
    "Add": ("+", 1),
    "Subtract": ("-", 1),
    "Multiply": ("×", 2),
    "Divide": ("/", 2),
    "TrueDivide": ("/", 2),
    "FloorDivide": ("//", 2),
    "Matmul": ("@", 2),
    "Power": ("**", 4),
}
_LONGEST = 64  # characters of a formula that still says something at a glance


def formula(calls: Iterable[Call], name_of: Callable[[keras.KerasTensor], str]) -> str:
    """Returns what operations compute, such as `x × rotation.cos + roll(x) × rotation.sin`.

    Args:
        calls: Calls of operations that belong together, in order.
        name_of: The name of a tensor that comes from elsewhere.

    Returns:
        The formulas of all tensors that none of the calls takes, one a line.
    """
    calls = list(calls)
    made = {id(x): call for call in calls for x in call.outputs}
    taken = {id(x) for call in calls for x in call.inputs}

    def term(x: Any, outer: int) -> str:
        if not isinstance(x, keras.KerasTensor):
            return _constant(x)
        if id(x) not in made:
            return name_of(x)
        text, binds = expression(made[id(x)])
        return f"({text})" if binds < outer else text

    def expression(call: Call) -> tuple[str, int]:
        kind = type(call.operation).__name__
        given = [x for x in tree.flatten((call.args, call.kwargs)) if x is not None]
        if kind in _INFIX and len(given) == 2:
            sign, binds = _INFIX[kind]
            return f"{term(given[0], binds)} {sign} {term(given[1], binds + 1)}", binds
        if kind == "Negative":
            return f"-{term(given[0], 3)}", 2
        if kind == "GetItem":
            x, key = call.args
            return f"{term(x, 5)}[{_index(key)}]", 5
        return f"{word(call.operation)}({', '.join(term(x, 0) for x in given)})", 5

    roots = [call for call in calls if not any(id(x) in taken for x in call.outputs)]
    return "\n".join(expression(call)[0] for call in roots)


def title(calls: Iterable[Call], text: str) -> str:
    """Returns what to write into a box: the formula if it is short, else the operations' names.

    Args:
        calls: The calls.
        text: Their formula.
    """
    if "\n" not in text and len(text) <= _LONGEST:
        return text
    return ", ".join(dict.fromkeys(word(call.operation) for call in calls))


def word(operation: keras.Operation) -> str:
    """Returns the function of `keras.ops` that an operation is, such as `expand_dims`."""
    name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", type(operation).__name__)
    return name.lower()


def _constant(x: Any) -> str:
    if isinstance(x, (bool, str)) or not hasattr(x, "__float__"):
        return f"{type(x).__name__}" if isinstance(x, slice) else str(x)
    values = np.asarray(x)
    return f"{float(values.reshape(())):.6g}" if values.size == 1 else f"constant{values.shape}"


def _index(key: Any) -> str:
    def one(x: Any) -> str:
        if isinstance(x, slice):
            ends = [("" if end is None else str(end)) for end in (x.start, x.stop)]
            return ":".join(ends + ([str(x.step)] if x.step is not None else []))
        return "..." if x is Ellipsis else str(x)

    return ", ".join(one(x) for x in key) if isinstance(key, tuple) else one(key)
