"""The decoder layer: residual branches in order."""

from collections.abc import Callable, Sequence

from functional_llm.blocks.attention import Inputs, Part, apply_parts
from functional_llm.graph.composite import CompositeLayer
from functional_llm.graph.types import Nested


def decoder(name: str, branches: Sequence[Sequence[Part]]) -> CompositeLayer:
    """Residual branches in order: `x = x + branch(x)` for each.

    A branch is a list of parts, such as `[rms_norm(...), attention(...)]`. A CompositeLayer whose
    name is in the cache receives all inputs of the block, every other layer only `x`.

    Args:
        name: Name of the layer.
        branches: Lists of parts.

    Returns:
        Layer from `{"x", "positions", "mask", "rotation", "cache"}` to `{"x", "cache"}`.
    """

    def body(inputs: Inputs) -> dict[str, Nested]:
        x, caches = inputs["x"], {}
        for branch in branches:
            y = x
            for part in branch:
                if isinstance(part, CompositeLayer) and part.name in inputs["cache"]:
                    result = part({**inputs, "x": y, "cache": inputs["cache"][part.name]})
                    y, caches[part.name] = result["x"], result["cache"]
                else:
                    y = apply_parts([part], y, inputs)
            x = x + y
        return {"x": x, "cache": caches}

    return CompositeLayer(body, name=name)


def pre_norm(
    name: str, norm: Callable[[str], Part], attention: CompositeLayer, mlp: CompositeLayer
) -> CompositeLayer:
    """A decoder layer with a norm before its attention, and one before its MLP.

    Args:
        name: Name of the layer.
        norm: Makes a norm of a given name.
        attention: Layer named "attention".
        mlp: Layer named "mlp".
    """
    return decoder(name, [[norm(f"{part.name}_norm"), part] for part in (attention, mlp)])


def sandwich(
    name: str, norm: Callable[[str], Part], attention: CompositeLayer, mlp: CompositeLayer
) -> CompositeLayer:
    """A decoder layer with norms on both sides of its attention and of its MLP.

    Args:
        name: Name of the layer.
        norm: Makes a norm of a given name.
        attention: Layer named "attention".
        mlp: Layer named "mlp".
    """

    def branch(part: CompositeLayer) -> list[Part]:
        return [norm(f"{part.name}_norm"), part, norm(f"{part.name}_post_norm")]

    return decoder(name, [branch(attention), branch(mlp)])
