"""What each layer of a model is for, and how its weights are split because of that.

Shapes: I inputs and O outputs of a matrix, V vocabulary, D model, E experts.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import keras

from functional_llm.graph.selection import walk
from functional_llm.graph.types import Layer
from functional_llm.sharding.mesh import EXPERTS, FSDP, MODEL, Axes

Axis: TypeAlias = str | None

# The names that our blocks give to matrices. A column's outputs are split: heads, or the inner
# width of an MLP; a row's inputs are, which come from columns: the sums meet behind it.
# https://arxiv.org/abs/1909.08053, section 3
_COLUMNS = {"query", "key", "value", "gate", "up", "head", "experts_gate", "experts_up"}
_ROWS = {"output", "down", "experts_down"}
_HEADS = {x: x for x in ("query", "key", "value", "gate")} | {"output": "query"}


@dataclass(frozen=True)
class Role:
    """What a layer is for.

    Args:
        name: In a word.
        shape: Of its kernel, or its table.
        wanted: The axis that is to split each dimension of it.
        heads: How many heads lie along the dimension that "model" splits; `None` for no heads.
    """

    name: str
    shape: tuple[int, ...]
    wanted: tuple[Axis, ...]
    heads: int | None = None

    def wanted_of(self, name: str, shape: Sequence[int]) -> list[Axis]:
        """Returns the axis that is to split each dimension of a weight of the layer.

        Biases, scales, packed integers and the matrices of adapters lie along dimensions of the
        kernel, which is how they are known; the rank of an adapter is none of these.

        Args:
            name: Of the weight.
            shape: Of it.
        """
        if len(shape) == len(self.shape):
            along = _along if is_of_kernel(name) else int.__eq__
            pairs = zip(shape, self.shape, self.wanted, strict=True)
            return [axis if along(size, whole) else None for size, whole, axis in pairs]
        # What is left of the kernel's dimensions where there are fewer: the first and the last.
        order = (0, -1) if self.name == "embedding" or len(shape) > 1 else (-1, 0)
        ends = [(self.shape[i], self.wanted[i]) for i in order]
        if len(shape) == 1:
            return [next((axis for whole, axis in ends if shape[0] == whole), None)]
        return [
            axis if size == whole else None
            for size, (whole, axis) in zip(shape, ends, strict=False)
        ]


def is_of_kernel(name: str) -> bool:
    """Whether a weight is a kernel or a table, or what it is quantised to."""
    return name.startswith(("kernel", "embeddings", "reverse_embeddings"))


def _along(size: int, whole: int) -> bool:
    """Whether a dimension is one of the kernel, or one of its groups or packed numbers."""
    return size == whole or (size > 1 and whole % size == 0 and whole // size <= 128)


@dataclass(frozen=True)
class Placement:
    """Which axis of a mesh splits each dimension of a weight, and why.

    Args:
        axes: For each dimension, the name of an axis or `None`.
        reason: In words.
    """

    axes: tuple[Axis, ...]
    reason: str


def roles_of(model: keras.Model) -> dict[str, Role]:
    """Returns path of a layer -> its role, for all that have one."""
    layers = dict(walk(model, composites=True))
    found = ((path, _role(path, layer, layers)) for path, layer in layers.items())
    return {path: role for path, role in found if role is not None}


def _role(path: str, layer: Layer, layers: Mapping[str, Layer]) -> Role | None:
    if isinstance(layer, keras.layers.Embedding):  # also a ReversibleEmbedding
        return Role("embedding", (layer.input_dim, layer.output_dim), (MODEL, FSDP))
    if not isinstance(layer, (keras.layers.Dense, keras.layers.EinsumDense)):
        return None
    parent, _, name = path.rpartition("/")
    experts = [EXPERTS] if name.startswith("experts_") else []
    shape = tuple(layer.kernel.shape)
    if name not in _COLUMNS | _ROWS or len(shape) != 2 + len(experts):
        return None
    if experts:
        name = name.removeprefix("experts_")
    reshape = layers.get(f"{parent}/{_HEADS.get(name)}_heads")
    # Value heads of one key head stay together.
    heads = reshape.target_shape[1] if isinstance(reshape, keras.layers.Reshape) else None
    if name in _COLUMNS:
        return Role("column", shape, (*experts, FSDP, MODEL), heads)
    return Role("row", shape, (*experts, MODEL, FSDP), heads)


def place(role: Role | None, name: str, shape: Sequence[int], axes: Axes) -> Placement:
    """Returns how a weight is split.

    Args:
        role: That of its layer, or `None` for a layer that our blocks do not name.
        name: Of the weight.
        shape: Of the weight.
        axes: Of the mesh.
    """
    chosen: list[Axis] = [None] * len(shape)
    reasons = ["no role" if role is None else role.name]
    for index, axis in enumerate(role.wanted_of(name, shape) if role else ()):
        if axis is None or axes[axis] == 1:
            continue
        own = axes.names[axis]
        if axis == MODEL and role and role.heads is not None and role.heads % axes[axis]:
            reasons.append(f"{role.heads} heads do not divide over {axes[axis]} ({own})")
        elif shape[index] % axes[axis]:
            reasons.append(f"{shape[index]} does not divide over {axes[axis]} ({own})")
        else:
            chosen[index] = own
    # An adapter is small: what its layer does not split of it stays whole.
    for axis in _left(role, chosen, axes) if role is None or is_of_kernel(name) else ():
        for index in _free(shape, chosen, axes[axis]):
            chosen[index] = axes.names[axis]
            reasons.append(f"{axes.names[axis]} on the largest dimension that divides")
            break
    if len(shape) < 2 and not any(chosen):
        reasons.append("small")
    return Placement(tuple(chosen), "; ".join(reasons))


def _left(role: Role | None, chosen: Sequence[Axis], axes: Axes) -> Iterator[str]:
    """Yields the axes that could split a matrix in a way that its role does not ask for."""
    for axis in (MODEL, FSDP):
        # Heads that do not divide stay whole, on each device of the axis. So do matrices that
        # our blocks do not name: how their inputs and outputs are split is not known.
        is_whole = axis == MODEL and (role is None or role.heads is not None)
        if axes[axis] > 1 and axes.names[axis] not in chosen and not is_whole:
            yield axis


def _free(shape: Sequence[int], chosen: Sequence[Axis], size: int) -> list[int]:
    """Returns the dimensions of a matrix that could be split, the largest first."""
    if len(shape) < 2:
        return []
    free = [i for i, n in enumerate(shape) if chosen[i] is None and n % size == 0]
    return sorted(free, key=lambda i: -shape[i])
