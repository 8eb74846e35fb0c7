"""Which kernel multiplies with experts: a pure function of what is known when a program is made."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from functional_llm.kernels import every_expert, few_experts, sorted_experts
from functional_llm.kernels.choosing import choose
from functional_llm.kernels.every_expert import Routing, Tensor

_FEW_ROWS = 16  # on CPUs: below, sorting costs more than it saves
_FEW_TOKENS = 256  # on GPUs: below, reading each matrix once takes longer than multiplying


@dataclass(frozen=True, kw_only=True)
class ExpertFacts:
    """What is known of a block of experts when its program is made.

    Args:
        platform: "cpu", "gpu" or "tpu"; "other" for another backend than JAX, and for symbolic
            tensors.
        tokens: In all rows of the batch.
        choices: Experts of a token.
        experts: All experts.
    """

    platform: str
    tokens: int
    choices: int
    experts: int

    @property
    def rows(self) -> int:
        """A row for each choice."""
        return self.tokens * self.choices


@dataclass(frozen=True)
class ExpertKernel:
    """A way to compute what `every_expert` defines: how rows lie, and how they are multiplied.

    Args:
        name: What it is called.
        obstacle: Facts -> why it cannot compute this, in words after "because"; `None` if it can.
        loses: Facts -> why another one is better, though it could; `None` if it is the best.
        route: (experts (B, T, k), E) -> tensors that the others need.
        spread: (x (B, T, D), routing) -> rows.
        spread_choices: (values (B, T, k), experts, routing) -> numbers for rows.
        multiply: (rows, kernel (E, D, F), routing) -> rows.
        of_experts: (values (E, F), routing) -> values for rows.
        collect: (rows, routing) -> (B, T, D).
    """

    name: str
    obstacle: Callable[[ExpertFacts], str | None]
    loses: Callable[[ExpertFacts], str | None]
    route: Callable[[Tensor, int], Routing]
    spread: Callable[..., Tensor]
    spread_choices: Callable[..., Tensor]
    multiply: Callable[..., Tensor]
    of_experts: Callable[..., Tensor]
    collect: Callable[..., Tensor]


def choose_experts(facts: ExpertFacts, name: str | None = None) -> tuple[ExpertKernel, str]:
    """Returns the first kernel that can and does not lose, and the reason.

    Args:
        facts: Of the call.
        name: The kernel that a user asks for.

    Raises:
        ValueError: If there is no kernel of this name, or it cannot compute this.
    """
    return choose(_KERNELS, facts, "kernel of experts", name)


def expert_kernels() -> Sequence[ExpertKernel]:
    """Returns the kernels, the first choice first."""
    return _KERNELS


def _needs_jax(facts: ExpertFacts) -> str | None:
    return "it needs JAX, and shapes that are known" if facts.platform == "other" else None


def _never(facts: ExpertFacts) -> None:
    return None


def _not_on(facts: ExpertFacts, platform: str) -> str | None:
    return None if facts.platform == platform else f"this is {facts.platform}"


def _one_by_one_loses(facts: ExpertFacts) -> str | None:
    many = f"{facts.rows} rows are more than {_FEW_ROWS}" if facts.rows > _FEW_ROWS else None
    return _not_on(facts, "cpu") or many


def _gathered_loses(facts: ExpertFacts) -> str | None:
    if facts.platform == "cpu":
        return "this is cpu, which would copy the matrices"
    return f"{facts.rows} rows are more than the experts" if facts.rows > facts.experts else None


def _every_loses(facts: ExpertFacts) -> str | None:
    if facts.platform == "other" or facts.choices == facts.experts:
        return None
    if facts.platform != "cpu" and facts.tokens <= _FEW_TOKENS:
        return None
    return f"it computes {facts.experts} experts for a token, and {facts.choices} are chosen"


_LAYOUTS = {
    module: {
        name: getattr(module, name)
        for name in ("route", "spread", "spread_choices", "of_experts", "collect")
    }
    for module in (every_expert, few_experts, sorted_experts)
}
_SMALL, _LARGE = (
    {**_LAYOUTS[sorted_experts], "route": partial(sorted_experts.route, largest=largest)}
    for largest in (128, 256)
)
_FEW = _LAYOUTS[few_experts]
_KERNELS = (
    ExpertKernel(
        "one_by_one",
        _needs_jax,
        _one_by_one_loses,
        multiply=few_experts.multiply_one_by_one,
        **_FEW,
    ),
    ExpertKernel(
        "gathered",
        _needs_jax,
        _gathered_loses,
        multiply=few_experts.multiply_gathered,
        **_FEW,
    ),
    ExpertKernel(
        "every", _never, _every_loses, multiply=every_expert.multiply, **_LAYOUTS[every_expert]
    ),
    ExpertKernel(
        "walk",
        _needs_jax,
        lambda facts: _not_on(facts, "cpu"),
        multiply=sorted_experts.walk,
        **_SMALL,
    ),
    ExpertKernel(
        "ragged",
        _needs_jax,
        lambda facts: _not_on(facts, "tpu"),
        multiply=sorted_experts.multiply_ragged,
        **_SMALL,
    ),
    ExpertKernel("tiles", _needs_jax, _never, multiply=sorted_experts.tiles, **_LARGE),
)
