"""How models stretch RoPE beyond the length that they were trained on at first.

Shapes: H head size.
"""

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np


class RopeScaling(Protocol):
    """How a model stretches RoPE beyond the length that it was trained on at first."""

    @property
    def magnitude(self) -> float:
        """Factor on cosine and sine."""

    def frequencies(self, base: np.ndarray, max_wavelength: float) -> np.ndarray:
        """Returns the scaled angles per position, (H/2).

        Args:
            base: The unscaled ones.
            max_wavelength: As for `Rope`.
        """

    def context(self, length: int) -> int:
        """Returns how many tokens the model takes, from the length that its numbers state."""


@dataclass(frozen=True, kw_only=True)
class LinearScaling:
    """Divides all positions by a factor.

    Reference:
        [Position Interpolation](https://arxiv.org/abs/2306.15595).
    """

    factor: float
    magnitude = 1.0

    def frequencies(self, base: np.ndarray, max_wavelength: float) -> np.ndarray:
        return base / np.float32(self.factor)

    def context(self, length: int) -> int:
        return max(length, int(length * self.factor))

    def stated(self, context: int) -> int:
        """Returns the length of which `context` makes this."""
        return math.ceil(context / self.factor) if self.factor > 1 else context


@dataclass(frozen=True, kw_only=True)
class Llama3Scaling:
    """Divides low frequencies by a factor, keeps high ones, and ramps linearly between them.

    Reference:
        [The Llama 3 Herd of Models](https://arxiv.org/abs/2407.21783); the formula is in Meta's
        `llama_models`, `apply_scaling`.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_sequence_length: int
    magnitude = 1.0

    def frequencies(self, base: np.ndarray, max_wavelength: float) -> np.ndarray:
        length = self.original_max_sequence_length
        low, high = self.low_freq_factor, self.high_freq_factor
        wavelengths = 2 * math.pi / base
        slow, fast = wavelengths > length / low, wavelengths < length / high
        scaled = np.where(slow, base / self.factor, base)
        kept = (length / wavelengths - low) / (high - low)
        smoothed = (1 - kept) * scaled / self.factor + kept * scaled
        return np.where(slow | fast, scaled, smoothed).astype("float32")

    def context(self, length: int) -> int:
        # A length above the original is that of the stretched model already.
        original = self.original_max_sequence_length
        return length if length > original else max(length, int(original * self.factor))


@dataclass(frozen=True, kw_only=True)
class YarnScaling:
    """Divides the frequency of a channel the more, the less often it turns in the original length.

    Reference:
        [YaRN](https://arxiv.org/abs/2309.00071), section 3.
    """

    factor: float
    original_max_sequence_length: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None

    @property
    def magnitude(self) -> float:
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return self.magnitude_at(self.mscale) / self.magnitude_at(self.mscale_all_dim)
        return self.magnitude_at(1.0)

    def magnitude_at(self, mscale: float) -> float:
        """Returns by how much longer vectors make up for softer scores."""
        return 1.0 if self.factor <= 1 else 0.1 * mscale * math.log(self.factor) + 1.0

    def frequencies(self, base: np.ndarray, max_wavelength: float) -> np.ndarray:
        dim = 2 * base.shape[0]
        low = self._channel(self.beta_fast, dim, max_wavelength)
        high = self._channel(self.beta_slow, dim, max_wavelength)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        span = high - low if high != low else 0.001
        interpolated = np.clip((np.arange(dim // 2, dtype="float32") - low) / span, 0.0, 1.0)
        kept = 1 - interpolated
        return (base / self.factor * (1 - kept) + base * kept).astype("float32")

    def context(self, length: int) -> int:
        return max(length, int(self.original_max_sequence_length * self.factor))

    def _channel(self, turns: float, dim: int, max_wavelength: float) -> float:
        """Returns the channel that turns so many times within the original length."""
        length = self.original_max_sequence_length
        return dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(max_wavelength))


@dataclass(frozen=True, kw_only=True)
class QueryScaledYarn(YarnScaling):
    """YaRN of a model whose queries grow with their position; `query_scale` does that.

    Args:
        query_beta: How much they grow.
    """

    query_beta: float = 0.0


@dataclass(frozen=True, kw_only=True)
class NtkAlphaScaling:
    """Multiplies the base (theta) by a power of a fixed number.

    Reference:
        Tencent's [Hunyuan](https://github.com/Tencent-Hunyuan/Hunyuan-7B), whose code names it
        `DynamicNTKAlpha`, though nothing in it is dynamic.
    """

    alpha: float
    magnitude = 1.0

    def frequencies(self, base: np.ndarray, max_wavelength: float) -> np.ndarray:
        dim = 2 * len(base)
        return unscaled_frequencies(dim, max_wavelength * self.alpha ** (dim / (dim - 2)))

    def context(self, length: int) -> int:
        return length


@dataclass(frozen=True, kw_only=True)
class ProportionalScaling:
    """Turns only the first of the pairs of channels, by the frequencies that they have anyway.

    Args:
        partial_rotary_factor: The part of them that turns.
        factor: What their frequencies are divided by.

    Reference:
        [Gemma 4](https://huggingface.co/docs/transformers/model_doc/gemma4), in Transformers' code.
    """

    partial_rotary_factor: float = 1.0
    factor: float = 1.0
    magnitude = 1.0

    def frequencies(self, base: np.ndarray, max_wavelength: float) -> np.ndarray:
        turning = int(self.partial_rotary_factor * 2 * len(base) // 2)
        turns = np.arange(len(base)) < turning
        return np.where(turns, base / np.float32(self.factor), np.float32(0))

    def context(self, length: int) -> int:
        return length


@dataclass(frozen=True, kw_only=True)
class FrequencyFactors:
    """Divides the frequency of each pair of channels by a number of its own.

    GGUF files store every scaling so (`rope_freqs`).
    """

    factors: tuple[float, ...]
    magnitude = 1.0

    def frequencies(self, base: np.ndarray, max_wavelength: float) -> np.ndarray:
        if len(self.factors) != len(base):
            raise ValueError(
                f"Expected {len(base)} frequency factors, one for each pair of channels. Received: "
                f"{len(self.factors)}."
            )
        return base / np.asarray(self.factors, dtype="float32")

    def context(self, length: int) -> int:
        return length


@dataclass(frozen=True, kw_only=True)
class LongRopeScaling:
    """Divides the frequency of each pair of channels by a number of its own, unlike in long texts.

    A text is long if it has more tokens than the model was trained on at first. In a batch each
    row is long or not on its own, and each segment of a row; Transformers takes all rows as long
    if one is. Keys in a cache stay as they were turned. So `TextGenerator`, like Transformers'
    `generate`, reads a text again from its start when it becomes long while it is written; a loop
    of your own has to (`layers.long_texts`).

    Args:
        short_factors: For texts that are not long, (H/2).
        long_factors: For long ones, (H/2).
        original_max_sequence_length: The longest text that is not long.
        factor: How many times as long the longest texts are; for the default of the next.
        attention_factor: Factor on cosine and sine.

    Reference:
        [LongRoPE](https://arxiv.org/abs/2402.13753); [Phi-3](https://arxiv.org/abs/2404.14219).
    """

    short_factors: tuple[float, ...]
    long_factors: tuple[float, ...]
    original_max_sequence_length: int
    factor: float
    attention_factor: float | None = None

    @property
    def magnitude(self) -> float:
        if self.attention_factor is not None:
            return self.attention_factor
        if self.factor <= 1:
            return 1.0
        length = math.log(self.original_max_sequence_length)
        return math.sqrt(1 + math.log(self.factor) / length)

    def frequencies(self, base: np.ndarray, max_wavelength: float) -> np.ndarray:
        return FrequencyFactors(factors=self.short_factors).frequencies(base, max_wavelength)

    def context(self, length: int) -> int:
        return length

    @property
    def long(self) -> FrequencyFactors:
        """What long texts turn by."""
        return FrequencyFactors(factors=self.long_factors)


def unscaled_frequencies(dim: int, max_wavelength: float) -> np.ndarray:
    """Returns the unscaled angles per position, (dim/2)."""
    # Rounded where torch rounds: one ulp moves the angles of far positions by 1e-4.
    exponents = np.arange(0, dim, 2, dtype="float32") / np.float32(dim)
    wavelengths = np.float64(max_wavelength) ** exponents.astype("float64")
    return np.float32(1.0) / wavelengths.astype("float32")
