"""Which kernel attends: a pure function of what is known when a program is made."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from functional_llm.kernels import splash
from functional_llm.kernels.blockwise import attend_in_blocks
from functional_llm.kernels.choosing import choose
from functional_llm.kernels.cudnn import attend_causally, attend_masked
from functional_llm.kernels.explicit import attend_explicitly
from functional_llm.kernels.mask import Tensor

Attend: TypeAlias = Callable[..., Tensor]

_FEW_QUERIES = 8
_SMALL_SCORES = 64 * 2**20  # bytes: below, blocks are no faster on CPUs
_LARGEST_MASK = 2**30  # bytes
_HALF = ("bfloat16", "float16")


@dataclass(frozen=True, kw_only=True)
class AttentionFacts:
    """What is known of a call of attention when its program is made.

    Args:
        platform: "cpu", "gpu" or "tpu"; "other" for another backend than JAX, and for symbolic
            tensors.
        capability: The compute capability of an NVIDIA GPU, (9, 0) say; (0, 0) for all else.
        dtype: Of queries, keys and values.
        batch_size: Rows.
        queries: Query tokens of a row.
        slots: Key slots of a row.
        heads: Query heads.
        kv_heads: Key/value heads.
        head_dim: Size of a query and of a key.
        value_dim: Size of a value.
        soft_cap: Whether scores are bounded.
        window: Of the mask, `None` for none.
        has_positions: Whether the mask has positions, and with them the causal rule.
        has_segments: Whether the mask has segments.
        has_mask: Whether it has booleans of its own.
        has_first: Whether queries see from a position of their own on.
        in_order: As in `Mask`.
        has_sinks: Whether there are sinks.
        has_slopes: Whether there are slopes.
    """

    platform: str
    capability: tuple[int, int] = (0, 0)
    dtype: str
    batch_size: int
    queries: int
    slots: int
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    soft_cap: bool = False
    window: int | None = None
    has_positions: bool = True
    has_segments: bool = False
    has_mask: bool = False
    has_first: bool = False
    in_order: bool = False
    has_sinks: bool = False
    has_slopes: bool = False

    @property
    def score_bytes(self) -> int:
        """The size of all scores in float32."""
        return 4 * self.batch_size * self.heads * self.queries * self.slots


@dataclass(frozen=True)
class AttentionKernel:
    """A way to compute what `attend_explicitly` defines.

    Args:
        name: What it is called.
        obstacle: Facts -> why it cannot compute this, in words after "because"; `None` if it can. A
            part of the mask that it does not honour is an obstacle.
        loses: Facts -> why another one is better, though it could; `None` if it is the best.
        attend: As `attend_explicitly`. Its obstacles say which arguments it never gets.
    """

    name: str
    obstacle: Callable[[AttentionFacts], str | None]
    loses: Callable[[AttentionFacts], str | None]
    attend: Attend


def choose_attention(facts: AttentionFacts, name: str | None = None) -> tuple[AttentionKernel, str]:
    """Returns the first kernel that can and does not lose, and the reason.

    Args:
        facts: Of the call.
        name: The kernel that a user asks for.

    Raises:
        ValueError: If there is no kernel of this name, or it cannot compute this.
    """
    return choose(_kernels, facts, "attention kernel", name)


def register_attention(kernel: AttentionKernel) -> None:
    """Makes a kernel the first choice where it can and does not lose.

    ```python
    def obstacle(facts):
        if facts.platform != "gpu" or facts.has_sinks or facts.has_slopes or facts.has_segments:
            return "it runs on GPUs, without sinks, slopes and segments"

    flm.register_attention(flm.AttentionKernel("mine", obstacle, lambda facts: None, attend))
    ```

    Args:
        kernel: One of the same name is replaced.
    """
    others = [other for other in _kernels if other.name != kernel.name]
    _kernels[:] = [kernel, *others]


def attention_kernels() -> Sequence[AttentionKernel]:
    """Returns the kernels, the first choice first."""
    return tuple(_kernels)


def _first(*conditions: tuple[bool, str]) -> str | None:
    return next((reason for holds, reason in conditions if holds), None)


def _explicit_loses(facts: AttentionFacts) -> str | None:
    if facts.platform == "other" or facts.queries <= _FEW_QUERIES:
        return None
    size = facts.score_bytes
    if size <= _SMALL_SCORES:
        return None
    return f"its scores would take {size / 2**20:,.0f} MB, more than {_SMALL_SCORES / 2**20:.0f}"


def _few_queries(facts: AttentionFacts) -> str | None:
    few = facts.queries <= _FEW_QUERIES
    return f"{facts.queries} queries are too few to gain" if few else None


def _of_this_order(facts: AttentionFacts) -> str | None:
    return _first(
        (not facts.in_order, "nobody says that the tokens are in order"),
        (facts.slots != facts.queries, "the slots are not the queries' tokens"),
        (facts.has_segments, "there are segments"),
        (facts.has_mask, "the mask has booleans of its own"),
        (facts.has_first, "queries see from a position of their own on"),
        (not facts.has_positions, "the mask is not causal"),
    )


def _cudnn_obstacle(facts: AttentionFacts) -> str | None:
    largest = 256 if facts.capability >= (9, 0) else 128
    return _first(
        (facts.platform != "gpu", f"it runs on GPUs, and this is {facts.platform}"),
        (facts.capability < (8, 0), "it needs compute capability 8.0"),
        (facts.dtype not in _HALF, f"it computes in half precision, and this is {facts.dtype}"),
        (facts.head_dim != facts.value_dim, "keys and values have other sizes"),
        (
            facts.head_dim % 8 != 0 or facts.head_dim > largest,
            f"heads have {facts.head_dim} numbers",
        ),
        (facts.soft_cap, "it has no soft cap"),
        (facts.has_sinks, "it has no sinks"),
        (facts.has_slopes, "it has no slopes"),
    )


def _cudnn_causal_obstacle(facts: AttentionFacts) -> str | None:
    return _cudnn_obstacle(facts) or _of_this_order(facts)


def _cudnn_masked_obstacle(facts: AttentionFacts) -> str | None:
    obstacle = _cudnn_obstacle(facts)
    if obstacle is None and (facts.queries % 2 == 1 or facts.slots % 2 == 1):
        obstacle = "its gradient needs even numbers of tokens"
    return obstacle


def _cudnn_masked_loses(facts: AttentionFacts) -> str | None:
    size = 2 * facts.batch_size * facts.queries * facts.slots
    too_large = f"its mask would take {size / 2**20:,.0f} MB" if size > _LARGEST_MASK else None
    return too_large or _few_queries(facts)


def _splash_obstacle(facts: AttentionFacts) -> str | None:
    obstacle = _first(
        (facts.platform != "tpu", f"it runs on TPUs, and this is {facts.platform}"),
        (facts.dtype not in _HALF, f"it computes in half precision, and this is {facts.dtype}"),
        (facts.has_slopes, "it has no slopes"),
    )
    obstacle = obstacle or _of_this_order(facts)
    if obstacle is None and facts.queries % splash.MULTIPLE != 0:
        obstacle = f"{facts.queries} tokens are no multiple of {splash.MULTIPLE}"
    return obstacle


def _blockwise_obstacle(facts: AttentionFacts) -> str | None:
    return "it needs JAX, and shapes that are known" if facts.platform == "other" else None


def _never(facts: AttentionFacts) -> None:
    return None


# What a chip has a kernel of its own for comes before what XLA makes of plain operations.
_kernels = [
    AttentionKernel("cudnn", _cudnn_causal_obstacle, _few_queries, attend_causally),
    AttentionKernel("splash", _splash_obstacle, _few_queries, splash.attend_by_splash),
    AttentionKernel("cudnn_masked", _cudnn_masked_obstacle, _cudnn_masked_loses, attend_masked),
    AttentionKernel("explicit", _never, _explicit_loses, attend_explicitly),
    AttentionKernel("blockwise", _blockwise_obstacle, _never, attend_in_blocks),
]
