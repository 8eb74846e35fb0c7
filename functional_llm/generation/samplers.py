"""Samplers: frozen values that turn the logits of one step into one token a row.

A sampler has a list of logit transforms, which it applies in the order written, and then chooses:

```python
Categorical(parts=(RepetitionPenalty(1.1), Temperature(0.7), TopK(50), TopP(0.9)))
```

Samplers and transforms are JAX pytrees. Their numbers are leaves, which a compiled program takes as
arguments: another temperature does not recompile, another list of parts does. A transform of your
own is a frozen dataclass under `@register_part`, with the same standing as the built-in ones.

Shape suffixes: B batch, V vocabulary. An axis written 1 is kept for broadcasting.
"""

import dataclasses
import difflib
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Protocol, TypedDict

import jax
import jax.numpy as jnp

from functional_llm.generation.logit_transforms import (
    LogitTransform,
    MinP,
    Number,
    RepetitionPenalty,
    Temperature,
    TopK,
    TopP,
    register_part,
)
from functional_llm.generation.sampling_math import draw, integer_probabilities

__all__ = [
    "Categorical",
    "Greedy",
    "LogitTransform",
    "MinP",
    "Number",
    "RepetitionPenalty",
    "Sampler",
    "SamplerNumbers",
    "Temperature",
    "TopK",
    "TopP",
    "choose",
    "get",
    "make",
    "needs_keys",
    "register_part",
]


class Sampler(Protocol):
    """Chooses a token for each row, from that row's logits, key and seen tokens only.

    Args:
        logits_BV: Floating-point logits of the next token. Sampling computes in float32.
        keys_B: One typed JAX key a row (`jax.random.key`); `None` for a sampler that has
            `needs_keys`, and it is false.
        seen_BV: Bool, the tokens that occur in the row's prompt and text so far. May be `None`
            unless `needs_seen` is true.

    Returns:
        int32 token ids of shape (B,).
    """

    @property
    def needs_seen(self) -> bool: ...

    def __call__(
        self, logits_BV: jax.Array, keys_B: jax.Array | None, seen_BV: jax.Array | None = None
    ) -> jax.Array: ...


def needs_keys(sampler: Sampler) -> bool:
    """Returns whether a sampler draws: if it does not say, it may."""
    return bool(getattr(sampler, "needs_keys", True))


@dataclasses.dataclass(frozen=True)
class _TransformingSampler:
    """Applies its parts to the logits. How the token is then chosen, a subclass says."""

    parts: tuple[LogitTransform, ...] = ()

    def __post_init__(self) -> None:
        parts = self.parts
        is_right = isinstance(parts, tuple | list) and all(
            callable(part) and hasattr(part, "needs_seen") and not jax.tree_util.all_leaves([part])
            for part in parts
        )
        if not is_right:
            raise ValueError(
                f"{type(self).__name__} expected `parts` to be a tuple of logit transforms, such "
                f"as `parts=(Temperature(0.7),)`. Received: {parts!r}. A transform of your own is "
                "a frozen dataclass with `needs_seen` and `__call__`, under `@register_part`."
            )
        object.__setattr__(self, "parts", tuple(parts))

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
class Greedy(_TransformingSampler):
    """The token with the largest logit after the parts; the lowest id of those that tie.

    Args:
        parts: Logit transforms, applied in this order.
    """

    needs_keys: ClassVar[bool] = False

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
class Categorical(_TransformingSampler):
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


_PARTS: dict[str, Callable[[Any], LogitTransform]] = {  # by the name of their number, in order
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
    """Makes a random sampler with a part for each given number, in the order of Transformers.

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


class SamplerNumbers(TypedDict, total=False):
    """The numbers of `make`, as keywords of all that generates."""

    temperature: Number | None
    top_k: int | jax.Array | None
    top_p: Number | None
    min_p: Number | None
    repetition_penalty: Number | None


def choose(identifier: str | Sampler | None, numbers: Mapping[str, object]) -> Sampler:
    """Returns the sampler that a name, numbers, or both describe.

    Args:
        identifier: As for `get`; `None` for what the numbers ask for: greedy without any.
        numbers: As for `get`. A temperature of 0 is greedy.

    Raises:
        ValueError: As `get`; at numbers beside a sampler that is no name.
    """
    given: dict[str, Any] = {name: x for name, x in numbers.items() if x is not None}
    temperature = given.get("temperature")
    if isinstance(temperature, (int, float)) and temperature == 0:
        del given["temperature"]
        if identifier is None or isinstance(identifier, str):
            identifier = "greedy"
    if identifier is None:
        identifier = "random" if given.keys() - {"repetition_penalty"} else "greedy"
    return get(identifier, **given)


def get(identifier: str | Sampler, **numbers: Number | None) -> Sampler:
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
    sampler = make(**(_DEFAULTS[identifier] | given))
    return Greedy(sampler.parts) if identifier == "greedy" else sampler
