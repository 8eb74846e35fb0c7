"""Samplers: frozen values that turn the logits of one step into one token a row.

A sampler is a list of logit transforms, applied in the order written, and a draw:

```python
Categorical(parts=(RepetitionPenalty(1.1), Temperature(0.7), TopK(50), TopP(0.9)))
```

Samplers and transforms are JAX pytrees. Their numbers are leaves, which a compiled program takes as
arguments: another temperature does not recompile, another list of parts does. A transform of your
own is a frozen dataclass under `@register_part`, with the same standing as those below.

Shape suffixes: B batch, V vocabulary. An axis written 1 is kept for broadcasting.
"""

import dataclasses
import difflib
import numbers
from collections.abc import Callable
from typing import Any, ClassVar, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from functional_llm.generation.sampling_math import (
    draw,
    integer_probabilities,
    largest_image,
    ordered_image,
    relative_probabilities,
)

Number = float | jax.Array
_Class = TypeVar("_Class", bound=type)


class LogitTransform(Protocol):
    """Logits in, logits out, -inf for a removed token; `needs_seen`: whether it reads `seen_BV`."""

    needs_seen: ClassVar[bool]

    def __call__(self, logits_BV: jax.Array, seen_BV: jax.Array | None) -> jax.Array: ...


class Sampler(Protocol):
    """Chooses a token a row, which depends on that row's logits, key and seen tokens only.

    Args:
        logits_BV: Floating-point logits of the next token. Sampling computes in float32.
        keys_B: One typed JAX key a row (`jax.random.key`). May be `None` if the draw is not random.
        seen_BV: Bool, the tokens that occur in the row's prompt or text so far. May be `None`
            unless `needs_seen` is true.

    Returns:
        int32 token ids of shape (B,).
    """

    @property
    def needs_seen(self) -> bool: ...

    def __call__(
        self, logits_BV: jax.Array, keys_B: jax.Array | None, seen_BV: jax.Array | None = None
    ) -> jax.Array: ...


def register_part(cls: _Class) -> _Class:
    """Registers a frozen dataclass as a pytree whose fields are all children.

    Unflattening does not run the constructor, whose checks could not judge a tracer or placeholder.
    """
    names = tuple(field.name for field in dataclasses.fields(cls))

    def flatten_with_keys(part: Any) -> tuple[tuple[tuple[Any, Any], ...], None]:
        keys = (jax.tree_util.GetAttrKey(name) for name in names)
        return tuple(zip(keys, (getattr(part, name) for name in names), strict=True)), None

    def unflatten(_: None, children: Any) -> Any:
        part: Any = object.__new__(cls)
        for name, child in zip(names, children, strict=True):
            object.__setattr__(part, name, child)
        return part

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten)
    return cls


@register_part
@dataclasses.dataclass(frozen=True)
class RepetitionPenalty:
    """Divides the positive logits of seen tokens by the penalty and multiplies the negative ones.

    Args:
        penalty: Above 0; 1 changes nothing.

    Reference:
        [CTRL](https://arxiv.org/abs/1909.05858)
    """

    penalty: Number
    needs_seen: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check(self, "penalty", "1.0 changes nothing.")

    def __call__(self, logits_BV: jax.Array, seen_BV: jax.Array | None) -> jax.Array:
        if seen_BV is None:
            raise ValueError(
                "RepetitionPenalty expected `seen_BV`, a bool array of the tokens so far. "
                "Received: None. Pass it whenever `sampler.needs_seen` is true."
            )
        logits_BV = logits_BV.astype(jnp.float32)
        penalty = jnp.asarray(self.penalty, jnp.float32)
        penalised_BV = jnp.where(logits_BV < 0, logits_BV * penalty, logits_BV / penalty)
        return jnp.where(seen_BV, penalised_BV, logits_BV)


@register_part
@dataclasses.dataclass(frozen=True)
class Temperature:
    """Divides the logits by the temperature.

    Args:
        temperature: Above 0. Below 1 sharpens the distribution, above 1 flattens it.
    """

    temperature: Number
    needs_seen: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _check(self, "temperature", 'For the most likely token use sampler="greedy".')

    def __call__(self, logits_BV: jax.Array, seen_BV: jax.Array | None) -> jax.Array:
        return logits_BV.astype(jnp.float32) / jnp.asarray(self.temperature, jnp.float32)


@register_part
@dataclasses.dataclass(frozen=True)
class TopK:
    """Keeps the k largest logits, and what ties with the smallest of them.

    Args:
        k: At least 1. With k ≥ V every token stays.
    """

    k: int | jax.Array
    needs_seen: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _check(self, "k", "To keep every token leave TopK out.", whole=True)

    def __call__(self, logits_BV: jax.Array, seen_BV: jax.Array | None) -> jax.Array:
        logits_BV = logits_BV.astype(jnp.float32)
        image_BV = ordered_image(logits_BV)
        k = jnp.minimum(jnp.asarray(self.k, jnp.int32), jnp.int32(logits_BV.shape[-1]))

        def k_are_left(image_B1: jax.Array) -> jax.Array:
            return jnp.sum(image_BV >= image_B1, axis=-1, keepdims=True, dtype=jnp.int32) >= k

        threshold_B1 = largest_image(k_are_left, logits_BV.shape[0])
        return jnp.where(image_BV >= threshold_B1, logits_BV, -jnp.inf)


@register_part
@dataclasses.dataclass(frozen=True)
class TopP:
    """Keeps the fewest most likely tokens that together have a probability of p, at least one.

    What ties with the last of them stays too.

    Args:
        p: Above 0 and at most 1. With 1 every token stays.

    Reference:
        [The Curious Case of Neural Text Degeneration](https://arxiv.org/abs/1904.09751)
    """

    p: Number
    tail: Number = dataclasses.field(init=False, repr=False, compare=False)
    needs_seen: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _check(self, "p", "To keep every token leave TopP out.", largest=1)
        # Taken in double precision: 1 - float32(p) is off by more than a rare token's probability.
        object.__setattr__(self, "tail", 1 - self.p)

    def __call__(self, logits_BV: jax.Array, seen_BV: jax.Array | None) -> jax.Array:
        logits_BV = logits_BV.astype(jnp.float32)
        image_BV = ordered_image(logits_BV)
        relative_BV = relative_probabilities(logits_BV)
        tail = jnp.asarray(self.tail, jnp.float32)
        tail_B1 = tail * jnp.sum(relative_BV, axis=-1, keepdims=True)

        def tail_is_below(image_B1: jax.Array) -> jax.Array:
            below_BV = jnp.where(image_BV < image_B1, relative_BV, jnp.float32(0))
            return jnp.sum(below_BV, axis=-1, keepdims=True) <= tail_B1

        threshold_B1 = largest_image(tail_is_below, logits_BV.shape[0])
        # A tiny p leaves a tail of everything: the most likely token stays all the same.
        threshold_B1 = jnp.minimum(threshold_B1, jnp.max(image_BV, axis=-1, keepdims=True))
        return jnp.where((image_BV >= threshold_B1) | (tail <= 0), logits_BV, -jnp.inf)


@register_part
@dataclasses.dataclass(frozen=True)
class MinP:
    """Keeps the tokens at least p times as likely as the most likely one.

    Args:
        p: Above 0 and at most 1.

    Reference:
        [Min-p sampling](https://arxiv.org/abs/2407.01082)
    """

    p: Number
    needs_seen: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _check(self, "p", "To keep every token leave MinP out.", largest=1)

    def __call__(self, logits_BV: jax.Array, seen_BV: jax.Array | None) -> jax.Array:
        logits_BV = logits_BV.astype(jnp.float32)
        keep_BV = relative_probabilities(logits_BV) >= jnp.asarray(self.p, jnp.float32)
        return jnp.where(keep_BV, logits_BV, -jnp.inf)


@dataclasses.dataclass(frozen=True)
class _Chain:
    parts: tuple[LogitTransform, ...] = ()

    def __post_init__(self) -> None:
        _check_parts(self)

    @property
    def needs_seen(self) -> bool:
        return any(part.needs_seen for part in self.parts)

    def transform(self, logits_BV: jax.Array, seen_BV: jax.Array | None) -> jax.Array:
        """Applies the parts in their order, in float32."""
        if logits_BV.ndim != 2:
            raise ValueError(
                "A sampler expected logits of shape (batch, vocabulary). Received: shape "
                f"{logits_BV.shape}. Pass the logits of one position a row."
            )
        logits_BV = logits_BV.astype(jnp.float32)
        for part in self.parts:
            logits_BV = part(logits_BV, seen_BV)
        return logits_BV


@register_part
@dataclasses.dataclass(frozen=True)
class Greedy(_Chain):
    """The token with the largest logit after the parts; the lowest id of those that tie.

    Args:
        parts: Logit transforms, applied in this order.
    """

    def __call__(
        self, logits_BV: jax.Array, keys_B: jax.Array | None, seen_BV: jax.Array | None = None
    ) -> jax.Array:
        logits_BV = self.transform(logits_BV, seen_BV)
        # Two plain reductions: XLA's argmax on the CPU takes four times as long.
        top_B1 = jnp.max(logits_BV, axis=-1, keepdims=True)
        id_BV = jax.lax.broadcasted_iota(jnp.int32, logits_BV.shape, 1)
        last = jnp.int32(logits_BV.shape[-1] - 1)
        return jnp.min(jnp.where(logits_BV == top_B1, id_BV, last), axis=-1)


@register_part
@dataclasses.dataclass(frozen=True)
class Categorical(_Chain):
    """A token drawn with the probabilities that the logits have after the parts.

    Args:
        parts: Logit transforms, applied in this order.
    """

    def __call__(
        self, logits_BV: jax.Array, keys_B: jax.Array | None, seen_BV: jax.Array | None = None
    ) -> jax.Array:
        if keys_B is None:
            raise ValueError(
                "Categorical expected `keys_B`, one JAX key a row. Received: None. "
                "Make them with `jax.random.split(jax.random.key(seed), batch_size)`."
            )
        return draw(integer_probabilities(self.transform(logits_BV, seen_BV)), keys_B)


_PARTS: dict[str, Callable[[Any], LogitTransform]] = {
    "repetition_penalty": RepetitionPenalty,
    "temperature": Temperature,
    "top_k": TopK,
    "top_p": TopP,
    "min_p": MinP,
}


def make(
    temperature: Number | None = None,
    top_k: int | jax.Array | None = None,
    top_p: Number | None = None,
    min_p: Number | None = None,
    repetition_penalty: Number | None = None,
) -> Categorical:
    """Makes a random sampler of the numbers that are given, its parts in the order of Transformers.

    Args:
        temperature: Of `Temperature`.
        top_k: Of `TopK`.
        top_p: Of `TopP`.
        min_p: Of `MinP`.
        repetition_penalty: Of `RepetitionPenalty`, which comes before all others.

    Returns:
        A `Categorical`; with no number given it draws from the model's own distribution.
    """
    values = (repetition_penalty, temperature, top_k, top_p, min_p)
    pairs = zip(_PARTS.values(), values, strict=True)
    return Categorical(tuple(part(value) for part, value in pairs if value is not None))


_DEFAULTS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "random": {},
    "categorical": {},
    "top_k": {"top_k": 50},
    "top_p": {"top_p": 0.9},
    "min_p": {"min_p": 0.05},
}


def get(identifier: str | Sampler, **numbers: Any) -> Sampler:
    """Finds a sampler by its name.

    Args:
        identifier: `"greedy"`, `"random"` (also `"categorical"`), `"top_k"` (50 unless told),
            `"top_p"` (0.9), `"min_p"` (0.05), or a sampler, which is returned as it is.
        **numbers: Of `make`: `temperature`, `top_k`, `top_p`, `min_p`, `repetition_penalty`. Greedy
            takes the last only.

    Returns:
        The sampler.

    Raises:
        ValueError: If the name or a number is unknown, or a number is out of range.
    """
    if not isinstance(identifier, str):
        if isinstance(identifier, type) or not hasattr(identifier, "needs_seen") or numbers:
            raise ValueError(
                f"Expected the name of a sampler ({', '.join(_DEFAULTS)}), or a sampler such as "
                f"`Greedy()` with no numbers beside it. Received: {identifier!r}, {numbers}. "
                "Set the numbers of a sampler object where it is made."
            )
        return identifier
    if identifier not in _DEFAULTS:
        near = difflib.get_close_matches(identifier, _DEFAULTS, n=1)
        raise ValueError(
            f"Unknown sampler. Expected one of {', '.join(_DEFAULTS)}, or a sampler object. "
            f"Received: {identifier!r}." + "".join(f" Did you mean {name!r}?" for name in near)
        )
    allowed = ("repetition_penalty",) if identifier == "greedy" else tuple(_PARTS)
    unknown = sorted(set(numbers) - set(allowed))
    if unknown:
        raise ValueError(
            f"Sampler {identifier!r} takes the numbers {', '.join(allowed)}. Received: "
            f"{', '.join(unknown)}. Leave them out or choose another sampler."
        )
    given = {name: value for name, value in numbers.items() if value is not None}
    chain = make(**(_DEFAULTS[identifier] | given))
    return Greedy(chain.parts) if identifier == "greedy" else chain


def _check(
    part: Any, field: str, advice: str, largest: float = np.inf, whole: bool = False
) -> None:
    """Checks a number that Python holds; arrays and tracers pass as they are."""
    value = getattr(part, field)
    if isinstance(value, jax.Array):
        return
    kind = numbers.Integral if whole else numbers.Real
    is_right = isinstance(value, kind) and not isinstance(value, bool)
    if is_right:
        with np.errstate(over="ignore"):
            rounded = np.float32(value)  # what the program will receive: 1e-50 is 0 there
        is_right = bool(0 < rounded < np.inf) and value <= (2**31 - 1 if whole else largest)
    if not is_right:
        expected = "an integer of at least 1" if whole else "a finite number above 0"
        at_most = "" if np.isinf(largest) else f" and at most {largest}"
        raise ValueError(
            f"{type(part).__name__} expected `{field}` to be {expected}{at_most}. "
            f"Received: {value!r}. {advice}"
        )
    # One Python type for every spelling, so that 1 and np.float64(1) share a compiled program.
    object.__setattr__(part, field, int(value) if whole else float(value))


def _check_parts(sampler: Any) -> None:
    parts = sampler.parts
    is_right = isinstance(parts, tuple | list) and all(
        callable(part) and hasattr(part, "needs_seen") and not jax.tree_util.all_leaves([part])
        for part in parts
    )
    if not is_right:
        raise ValueError(
            f"{type(sampler).__name__} expected `parts` to be a tuple of logit transforms, such as "
            f"`parts=(Temperature(0.7),)`. Received: {parts!r}. A transform of your own is a "
            "frozen dataclass with `needs_seen` and `__call__`, under `@register_part`."
        )
    object.__setattr__(sampler, "parts", tuple(parts))
