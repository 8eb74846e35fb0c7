"""Rotary position embedding: the frequency of each pair of channels, and the rotation.

Shapes: B batch, T tokens, H head size.
"""

from dataclasses import dataclass, replace

import numpy as np
from keras import ops

from functional_llm.blocks.attention import Inputs, PartFunction
from functional_llm.blocks.rope_scaling import (
    LongRopeScaling,
    RopeScaling,
    unscaled_frequencies,
)
from functional_llm.graph.types import Tensor
from functional_llm.layers.long_texts import IsLongText


@dataclass(frozen=True)
class Rope:
    """The frequencies of a rotary position embedding.

    Args:
        head_dim: H, even; or the number of channels that `on_first_channels` rotates.
        max_wavelength: The base (theta): wavelengths go from 2 pi to nearly 2 pi times this.
        scaling: How frequencies are scaled; `None` for not at all.

    Raises:
        ValueError: If `head_dim` is odd.

    Reference:
        [RoFormer](https://arxiv.org/abs/2104.09864), with channels i and i + H/2 as a pair.
    """

    head_dim: int
    max_wavelength: float
    scaling: RopeScaling | None = None

    def __post_init__(self) -> None:
        if self.head_dim % 2:
            raise ValueError(
                f"RoPE turns pairs of channels: expected an even head_dim, got {self.head_dim}."
            )

    @property
    def magnitude(self) -> float:
        """Factor on cosine and sine."""
        return 1.0 if self.scaling is None else self.scaling.magnitude

    @property
    def frequencies(self) -> np.ndarray:
        """Angles per position, (H/2), float32."""
        frequencies = unscaled_frequencies(self.head_dim, self.max_wavelength)
        if self.scaling is None:
            return frequencies
        with np.errstate(all="ignore"):  # checked below
            try:
                frequencies = self.scaling.frequencies(frequencies, self.max_wavelength)
            except ArithmeticError:
                frequencies = np.array(np.nan)
        if not np.isfinite(frequencies).all():
            raise ValueError(
                "Expected RoPE scaling that gives finite frequencies. Received: the base "
                f"{self.max_wavelength} with {vars(self.scaling)}."
            )
        return frequencies


def rotation(
    positions_BT: Tensor, rope: Rope, segment_ids_BT: Tensor | None = None, name: str = "rotation"
) -> dict[str, Tensor]:
    """Returns cosine and signed sine of every position's angles, for `rotary`.

    Args:
        positions_BT: (B, T) integers.
        rope: The frequencies.
        segment_ids_BT: (B, T) integers, or `None`: which tokens of a row are one text.
        name: What the names of layers begin with.

    Returns:
        `{"cos": (B, T, 1, H), "sin": (B, T, 1, H)}`, float32. The first half of `sin` is negative.
    """
    frequencies = rope.frequencies
    if isinstance(scaling := rope.scaling, LongRopeScaling):
        texts = {"positions": positions_BT, "segment_ids": segment_ids_BT}
        is_long = IsLongText(scaling.original_max_sequence_length, name=f"{name}_is_long")(texts)
        long = replace(rope, scaling=scaling.long).frequencies
        frequencies = ops.where(is_long, long, frequencies)
    angles = ops.cast(ops.expand_dims(positions_BT, (2, 3)), "float32") * frequencies
    cos, sin = ops.cos(angles) * rope.magnitude, ops.sin(angles) * rope.magnitude
    return {
        "cos": ops.concatenate([cos, cos], axis=-1),
        "sin": ops.concatenate([-sin, sin], axis=-1),
    }


def rotary() -> PartFunction:
    """Part that rotates (B, T, heads, H) by the block's input "rotation"."""

    def rotate(x: Tensor, inputs: Inputs) -> Tensor:
        cos, sin = inputs["rotation"]["cos"], inputs["rotation"]["sin"]
        return x * cos + ops.roll(x, x.shape[-1] // 2, axis=-1) * sin

    return rotate


def no_rotary() -> PartFunction:
    """Part that stands where `rotary` does in a layer without positions."""
    return lambda x, inputs: x


def query_scale(length: int, beta: float, offset: int = 0) -> PartFunction:
    """Part that multiplies queries (B, T, N, H), the more the farther on they stand.

    The factor of position p is 1 + beta * ln(1 + floor((p + offset) / length)).

    Args:
        length: So many positions have the same factor.
        beta: How much the factor grows.
        offset: By how much positions are counted higher.

    Reference:
        [Scalable-Softmax](https://arxiv.org/abs/2501.19399), from which Llama 4 has it.
    """

    def grow(x: Tensor, inputs: Inputs) -> Tensor:
        # Padding has position -1, of which there is no logarithm.
        steps_BT11 = ops.maximum(ops.expand_dims(inputs["positions"], (2, 3)), 0)
        steps_BT11 = (steps_BT11 + offset if offset else steps_BT11) // length
        factor = 1 + beta * ops.log1p(ops.cast(steps_BT11, "float32"))
        return x * ops.cast(factor, x.dtype)

    return grow


def rotary_pairs() -> PartFunction:
    """As `rotary`, with channels 2i and 2i + 1 as a pair: the order of the paper and of GPT-J."""

    def rotate(x: Tensor, inputs: Inputs) -> Tensor:
        half = x.shape[-1] // 2
        halves = inputs["rotation"]
        cos, sin = (ops.repeat(halves[key][..., half:], 2, axis=-1) for key in ("cos", "sin"))
        even = np.arange(x.shape[-1]) % 2 == 0
        turned = ops.where(even, -ops.roll(x, -1, axis=-1), ops.roll(x, 1, axis=-1))
        return x * cos + turned * sin

    return rotate


def on_first_channels(rotate: PartFunction) -> PartFunction:
    """Part that rotates as many first channels as the rotation has angles for, and keeps the rest.

    Args:
        rotate: `rotary()` or `rotary_pairs()`.
    """

    def rotate_some(x: Tensor, inputs: Inputs) -> Tensor:
        size = inputs["rotation"]["cos"].shape[-1]
        if size == x.shape[-1]:
            return rotate(x, inputs)
        return ops.concatenate([rotate(x[..., :size], inputs), x[..., size:]], axis=-1)

    return rotate_some
