"""The layout of a model on a mesh."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import keras
import numpy as np

from functional_llm.graph.backend import require_jax
from functional_llm.presets.backbone import without_values
from functional_llm.sharding.mesh import Axes, axes_of
from functional_llm.sharding.roles import Placement, Role, place, roles_of

_MOST_REPLICATED = 0.05


@dataclass(frozen=True)
class Weight:
    """A weight of a model on a mesh.

    Args:
        path: Of the variable.
        shape: Of the whole.
        dtype: Of it.
        placement: How it is split.
        shares: In how many parts.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    placement: Placement
    shares: int

    @property
    def size(self) -> int:
        """Bytes of the whole."""
        return math.prod(self.shape) * np.dtype(jax.numpy.dtype(self.dtype)).itemsize


class RowsLayout(keras.distribution.TensorLayout):
    """The layout of data whose first axis is split over several axes of a mesh.

    Args:
        names: Of these axes.
        rank: Of the data.
        device_mesh: The mesh.
    """

    def __init__(
        self, names: tuple[str, ...], rank: int, device_mesh: keras.distribution.DeviceMesh
    ) -> None:
        super().__init__([None] * rank, device_mesh)
        self._names = names

    @property
    def axes(self) -> tuple[Any, ...]:
        """For each dimension, the axes that split it; Keras knows one for each."""
        return (self._names or None, *super().axes[1:])


class Layout(keras.distribution.ModelParallel):
    """Where each weight of a model and each row of a batch lie on a mesh of devices.

    Weights that the model did not have when the layout was made, as those of adapters and of
    optimizers, follow the layer that they belong to.

    Args:
        device_mesh: The mesh.
        axes: Its axes.
        roles: Path of a layer -> its role.
        weights: Those of the model.
    """

    def __init__(
        self,
        device_mesh: keras.distribution.DeviceMesh,
        axes: Axes,
        roles: Mapping[str, Role],
        weights: list[Weight],
    ) -> None:
        self._axes = axes  # Keras asks for the replicas at once, if there are several processes
        super().__init__(
            layout_map=keras.distribution.LayoutMap(device_mesh),
            batch_dim_name=(axes.of_rows or device_mesh.axis_names)[0],
            auto_shard_dataset=False,
        )
        self._roles = dict(roles)
        self.weights = weights

    @property
    def num_model_replicas(self) -> int:
        """In how many parts the rows of a batch are split."""
        return math.prod(self._axes.sizes[name] for name in self._axes.of_rows)

    @property
    def _num_own_parts(self) -> int:
        """How many of these parts are on devices of this process."""
        parts = self.num_model_replicas
        if self.num_processes == 1:
            return parts
        sharding = RowsLayout(self._axes.of_rows, 1, self.device_mesh).backend_layout
        return len({str(x) for x in sharding.addressable_devices_indices_map((parts,)).values()})

    def get_data_layout(self, data_shape: tuple[int, ...]) -> keras.distribution.TensorLayout:
        """Returns where data lie, by their rows.

        Keras asks with the rows of this process, if there are several.

        Raises:
            ValueError: If the rows do not divide.
        """
        parts = self.num_model_replicas
        if data_shape and data_shape[0] % self._num_own_parts:
            names = " and ".join(f"{name}={self._axes.sizes[name]}" for name in self._axes.of_rows)
            here = "" if parts == self._num_own_parts else f", {self._num_own_parts} of them here"
            raise ValueError(
                f"Expected a batch whose rows divide over {parts} devices ({names}){here}. "
                f"Received: {data_shape[0]} rows. Take a multiple of {self._num_own_parts}."
            )
        return RowsLayout(self._axes.of_rows, len(data_shape), self.device_mesh)

    def get_variable_layout(self, variable: keras.Variable) -> keras.distribution.TensorLayout:
        """Returns where a variable lies."""
        placement = self.placement(variable.path, tuple(variable.shape))
        return keras.distribution.TensorLayout(placement.axes, self.device_mesh)

    def placement(self, path: str, shape: tuple[int, ...]) -> Placement:
        """Returns how a weight is split, and why.

        Args:
            path: Of the variable; what belongs to a layer has its path in front.
            shape: Of it.
        """
        layer, _, name = path.rpartition("/")
        while layer and layer not in self._roles:
            layer = layer.rpartition("/")[0]
        return place(self._roles.get(layer), name, shape, self._axes)

    def explain(self) -> str:
        """Returns a table: each weight, how it is split, its bytes on a device, and why.

        Weights that differ by the number of their layer, and in nothing else, are one line.
        """
        groups: dict[tuple[Any, ...], list[Weight]] = {}
        for weight in self.weights:
            name = re.sub(r"_\d+(?=/)", "_*", weight.path)
            groups.setdefault((name, weight.shape, weight.placement), []).append(weight)
        rows = [("weight", "shape", "split", "MB a device", "why")]
        for (name, shape, placement), own in groups.items():
            split = ", ".join(str(axis or "-") for axis in placement.axes)
            megabytes = sum(x.size / x.shares for x in own) / 1e6
            count = f" (x{len(own)})" if len(own) > 1 else ""
            rows.append((name + count, str(shape), split, f"{megabytes:.2f}", placement.reason))
        whole = sum(x.size for x in self.weights) / 1e6
        share = sum(x.size / x.shares for x in self.weights) / 1e6
        rows.append(("all", "", "", f"{share:.2f}", f"of {whole:.2f} MB"))
        widths = [max(len(row[i]) for row in rows) for i in range(5)]
        lines = ("  ".join(x.ljust(n) for x, n in zip(row, widths, strict=True)) for row in rows)
        return "\n".join(line.rstrip() for line in lines)


def layout(
    handle_or_backbone: str | Path | keras.Model,
    mesh: keras.distribution.DeviceMesh,
    model: str | None = None,
    fsdp: str | None = None,
    experts: str | None = None,
    *,
    dtype: str = "float32",
    most_replicated: float = _MOST_REPLICATED,
) -> Layout:
    """Returns where the weights of a model lie on a mesh, from what its layers are for.

    ```python
    layout = flm.sharding.layout("llama3.1_8b", flm.sharding.mesh("fsdp=4,model=2"))
    print(layout.explain())
    keras.distribution.set_distribution(layout)
    backbone = flm.Backbone.from_preset("llama3.1_8b", dtype="bfloat16")
    ```

    Args:
        handle_or_backbone: A handle, of which nothing is loaded; or a model, rewired ones too.
        mesh: A mesh with axes `data`, `fsdp`, `model`, `experts`, or some of them, as from
            `flm.sharding.mesh`; or with others.
        model: Name of the axis that splits heads and MLPs, if it is another than "model".
        fsdp: Name of the axis that splits rows and weights, if it is another than "fsdp".
        experts: Name of the axis that splits experts, if it is another than "experts". Axes that
            are neither of the three split rows.
        dtype: As for `Backbone.from_preset`, for a handle.
        most_replicated: The share of the bytes that may lie whole on every device, though the mesh
            has an axis for weights.

    Returns:
        A `keras.distribution.ModelParallel`.

    Raises:
        RuntimeError: With another backend than JAX.
        ValueError: At an axis that is not there or of unknown purpose, or if more than
            `most_replicated` is whole.
    """
    require_jax("flm.sharding.layout")
    axes = axes_of(mesh, model, fsdp, experts)
    backbone = handle_or_backbone
    if not isinstance(backbone, keras.Model):
        backbone = without_values(backbone, dtype)
    new = Layout(mesh, axes, roles_of(backbone), [])
    for variable in backbone.variables:
        shape = tuple(variable.shape)
        placement = new.placement(variable.path, shape)
        shares = math.prod(axes.sizes[axis] for axis in placement.axes if axis)
        new.weights.append(Weight(variable.path, shape, variable.dtype, placement, shares))
    _check_replicated(new.weights, axes, most_replicated)
    return new


def _check_replicated(weights: list[Weight], axes: Axes, most: float) -> None:
    if not axes.split_weights:  # nobody asks for anything else
        return
    whole = [x for x in weights if x.shares == 1]
    share = sum(x.size for x in whole) / sum(x.size for x in weights)
    if share > most:
        largest = sorted(whole, key=lambda x: -x.size)[:3]
        named = "; ".join(f"'{x.path}' {x.shape} ({x.placement.reason})" for x in largest)
        raise ValueError(
            f"Expected at most {most:.0%} of the bytes on every device of {axes.sizes}. Received: "
            f"{share:.0%}, the largest of them {named}. Take axes that divide them, or allow it "
            "with `most_replicated`."
        )
