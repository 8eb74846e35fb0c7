"""The decoder layer: residual branches in order."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from functional_llm.blocks.attention import BesideX, Inputs, Part, apply_parts
from functional_llm.graph.composite import CompositeLayer
from functional_llm.graph.types import Nested, Tensor

NamedPart: TypeAlias = CompositeLayer | BesideX  # named "attention" or "mlp"


@dataclass(frozen=True)
class Sum:
    """Branches that see the same, as a part of a branch: their results are added.

    Args:
        branches: Lists of parts.
    """

    branches: Sequence[Sequence[Part]]


def decoder(
    name: str, branches: Sequence[Sequence[Part | Sum]], behind: Sequence[Part] = ()
) -> CompositeLayer:
    """Residual branches in order: `x = x + branch(x)` for each.

    A branch is a list of parts, such as `[rms_norm(...), attention(...)]`. A CompositeLayer whose
    name is in the cache receives all inputs of the block, every other layer only `x`.

    Args:
        name: Name of the layer.
        branches: Lists of parts, a `Sum` of branches among them.
        behind: Parts behind the last sum.

    Returns:
        Layer from `{"x", "positions", "mask", "rotation", "cache"}` to `{"x", "cache"}`, and what
        a part with a cache returns beside them.
    """

    def step(x: Tensor, apply: Apply) -> Tensor:
        def through(branch: Sequence[Part | Sum], y: Tensor) -> Tensor:
            for part in branch:
                if isinstance(part, Sum):
                    first, *others = [through(inner, y) for inner in part.branches]
                    y = sum(others, start=first)
                else:
                    y = apply(part, y)
            return y

        for branch in branches:
            x = x + through(branch, x)
        for part in behind:
            x = apply(part, x)
        return x

    return layer_of_parts(name, step)


Apply: TypeAlias = Callable[[Part, Tensor], Tensor]  # a part, and what it is applied to


def layer_of_parts(name: str, step: Callable[[Tensor, Apply], Tensor]) -> CompositeLayer:
    """Returns a decoder layer; parts that `step` applies renew their own part of the cache.

    Args:
        name: Name of the layer.
        step: From `x`, and from what applies a part to something, to the new `x`.
    """

    def body(inputs: Inputs) -> dict[str, Nested]:
        caches: dict[str, Nested] = {}
        others: dict[str, Nested] = {}  # such as keys and values that are lent

        def apply(part: Part, x: Tensor) -> Tensor:
            if isinstance(part, CompositeLayer) and part.name in inputs["cache"]:
                result = part({**inputs, "x": x, "cache": inputs["cache"][part.name]})
                caches[part.name] = result["cache"]
                others.update({k: y for k, y in result.items() if k not in ("x", "cache")})
                return result["x"]
            return apply_parts([part], x, inputs)

        return {"x": step(inputs["x"], apply), "cache": caches, **others}

    return CompositeLayer(body, name=name, autocast=False)  # a cache keeps its dtypes


def parallel(
    name: str, norms: Sequence[Part], attention: CompositeLayer, mlp: NamedPart
) -> CompositeLayer:
    """A decoder layer whose branches see the same input: x + attention(norm(x)) + mlp(norm(x)).

    Args:
        name: Name of the layer.
        norms: One norm that both branches share, or that of the attention and that of the MLP.
        attention: Layer named "attention".
        mlp: Layer or part named "mlp".

    Reference:
        [GPT-J](https://github.com/kingoflolz/mesh-transformer-jax), with one norm;
        [GPT-NeoX](https://arxiv.org/abs/2204.06745), section 2.1, with two.
    """

    def step(x: Tensor, apply: Apply) -> Tensor:
        normed = [apply(norm, x) for norm in norms]
        return x + apply(attention, normed[0]) + apply(mlp, normed[-1])

    return layer_of_parts(name, step)


def post_norm(
    name: str, norm: Callable[[str], Part], attention: CompositeLayer, mlp: NamedPart
) -> CompositeLayer:
    """A decoder layer with a norm behind each sum: norm(x + attention(x)), as in 2017.

    Args:
        name: Name of the layer.
        norm: Makes a norm of a given name.
        attention: Layer named "attention".
        mlp: Layer or part named "mlp".

    Reference:
        [Attention Is All You Need](https://arxiv.org/abs/1706.03762).
    """

    def step(x: Tensor, apply: Apply) -> Tensor:
        for part in (attention, mlp):
            x = apply(norm(f"{part.name}_norm"), x + apply(part, x))
        return x

    return layer_of_parts(name, step)


def norm_behind_branches(
    name: str, norm: Callable[[str], Part], attention: CompositeLayer, mlp: NamedPart
) -> CompositeLayer:
    """A decoder layer with a norm at the end of each branch: x + norm(attention(x)).

    Args:
        name: Name of the layer.
        norm: Makes a norm of a given name.
        attention: Layer named "attention".
        mlp: Layer or part named "mlp".

    Reference:
        [OLMo 2](https://arxiv.org/abs/2501.00656).
    """
    return decoder(name, [[part, norm(f"{part.name}_post_norm")] for part in (attention, mlp)])


def pre_norm(
    name: str, norm: Callable[[str], Part], attention: CompositeLayer, mlp: NamedPart
) -> CompositeLayer:
    """A decoder layer with a norm before its attention, and one before its MLP.

    Args:
        name: Name of the layer.
        norm: Makes a norm of a given name.
        attention: Layer named "attention".
        mlp: Layer or part named "mlp".
    """
    return decoder(name, [[norm(f"{part.name}_norm"), part] for part in (attention, mlp)])


def sandwich(
    name: str, norm: Callable[[str], Part], attention: CompositeLayer, mlp: NamedPart
) -> CompositeLayer:
    """A decoder layer with norms on both sides of its attention and of its MLP.

    Args:
        name: Name of the layer.
        norm: Makes a norm of a given name.
        attention: Layer named "attention".
        mlp: Layer or part named "mlp".
    """

    def branch(part: NamedPart) -> list[Part]:
        return [norm(f"{part.name}_norm"), part, norm(f"{part.name}_post_norm")]

    return decoder(name, [branch(attention), branch(mlp)])
