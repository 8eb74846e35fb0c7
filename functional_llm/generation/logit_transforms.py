"""Logit transforms: the parts of a sampler, which change the logits before it chooses a token.

Shape suffixes: B batch, V vocabulary. An axis written 1 is kept for broadcasting.
"""

import dataclasses
import numbers
from collections.abc import Iterable, Iterator
from typing import ClassVar, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from functional_llm.generation.sampling_math import (
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


def register_part(cls: _Class) -> _Class:
    """Registers a frozen dataclass as a pytree whose fields are all children.

    Unflattening skips the constructor, whose checks would refuse tracers and placeholders.
    """
    names = tuple(field.name for field in dataclasses.fields(cls))
    keys = tuple(jax.tree_util.GetAttrKey(name) for name in names)

    def flatten_with_keys(part: object) -> tuple[Iterator[tuple[object, object]], None]:
        return zip(keys, (getattr(part, name) for name in names), strict=True), None

    def unflatten(_: None, children: Iterable[object]) -> object:
        part: object = object.__new__(cls)
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
    """Keeps the k largest logits, and those that tie with the smallest of them.

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

    Tokens that tie with the last of them stay too.

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
        # In double precision: the error of 1 - float32(p) is above a rare token's probability.
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
        # With a tiny p the tail holds all tokens; the most likely one stays.
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


def _check(
    part: LogitTransform, field: str, advice: str, largest: float = np.inf, whole: bool = False
) -> None:
    """Checks a Python number; arrays and tracers are not checked."""
    value = getattr(part, field)
    if isinstance(value, jax.Array):
        return
    kind = numbers.Integral if whole else numbers.Real
    is_right = isinstance(value, kind) and not isinstance(value, bool)
    if is_right:
        with np.errstate(over="ignore"):
            rounded = np.float32(value)  # as the program receives it: 1e-50 is 0 there
        is_right = bool(0 < rounded < np.inf) and value <= (2**31 - 1 if whole else largest)
    if not is_right:
        expected = "an integer of at least 1" if whole else "a finite number above 0"
        at_most = "" if np.isinf(largest) else f" and at most {largest}"
        raise ValueError(
            f"{type(part).__name__} expected `{field}` to be {expected}{at_most}. "
            f"Received: {value!r}. {advice}"
        )
    # One Python type, so that 1 and np.float64(1) share a compiled program.
    object.__setattr__(part, field, int(value) if whole else float(value))
