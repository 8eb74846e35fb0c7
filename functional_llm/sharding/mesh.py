"""Meshes of devices, and what their axes are for."""

import math
import re
from dataclasses import dataclass

import keras

DATA, FSDP, MODEL, EXPERTS = "data", "fsdp", "model", "experts"
_MEANING = {
    DATA: "rows of a batch, all weights on each",
    FSDP: "rows of a batch, and weights, which are gathered where they are used",
    MODEL: "heads and the inner width of MLPs",
    EXPERTS: "the experts of a layer",
}


@dataclass(frozen=True)
class Axes:
    """What each axis of a mesh is for, and how long it is: 1, if the mesh has none for that.

    Args:
        sizes: Name of an axis -> devices along it.
        names: What it is for, if it splits weights -> name of the axis.
    """

    sizes: dict[str, int]
    names: dict[str, str]

    def __getitem__(self, purpose: str) -> int:
        return self.sizes[self.names[purpose]] if purpose in self.names else 1

    @property
    def of_rows(self) -> tuple[str, ...]:
        """The names of the axes that split the rows of a batch."""
        others = {self.names.get(MODEL), self.names.get(EXPERTS)}
        return tuple(name for name in self.sizes if name not in others)

    @property
    def split_weights(self) -> bool:
        """Whether an axis splits weights."""
        return any(self[purpose] > 1 for purpose in self.names)


def axes_of(
    device_mesh: keras.distribution.DeviceMesh,
    model: str | None = None,
    fsdp: str | None = None,
    experts: str | None = None,
) -> Axes:
    """Returns the axes of a mesh.

    Args:
        device_mesh: The mesh.
        model: Name of the axis that splits heads and MLPs; `None` for the one that is called so.
        fsdp: Of the one that splits rows and weights; the same.
        experts: Of the one that splits experts; the same.

    Raises:
        ValueError: If the mesh has no axis of such a name, one of them shall be two things, or, if
            none is named here, one has a name that says nothing of what it is for.
    """
    sizes = dict(zip(device_mesh.axis_names, device_mesh.shape, strict=True))
    given = {MODEL: model, FSDP: fsdp, EXPERTS: experts}
    named = {purpose: name for purpose, name in given.items() if name is not None}
    missing = [name for name in named.values() if name not in sizes]
    if missing or len(set(named.values())) != len(named):
        raise ValueError(
            f"Expected an axis of the mesh for each purpose, out of {list(sizes)}. Received: "
            f"{named}."
        )
    unknown = [name for name in sizes if name not in (*_MEANING, "batch")]
    if unknown and not named:
        known = "; ".join(f"'{name}' ({what})" for name, what in _MEANING.items())
        raise ValueError(
            f"Expected a mesh whose axes are among {known}. Received: {list(sizes)}, of which "
            f"{unknown} are unknown. Say what they are for: model=, fsdp=, experts=."
        )
    taken = set(named.values())
    own = {purpose: purpose for purpose in given if purpose in sizes and purpose not in taken}
    return Axes(sizes, own | named)


def mesh(text: str) -> keras.distribution.DeviceMesh:
    """Returns a mesh of all devices.

    ```python
    mesh = flm.sharding.mesh("data=4,model=2")
    ```

    Args:
        text: Names of axes and how many devices there are along each. `data` splits the rows of a
            batch; `fsdp` splits them and the weights; `model` splits heads and MLPs; `experts`
            splits experts.

    Returns:
        A `keras.distribution.DeviceMesh`; the last axis has neighbouring devices.

    Raises:
        ValueError: If the text has another form, an axis is unknown, or the product of the sizes
            is not the number of devices.
    """
    parts = [part.strip() for part in text.split(",")]
    found = [re.fullmatch(r"(\w+)=([1-9]\d*)", part) for part in parts]
    names = [match[1] for match in found if match]
    if None in found or len(set(names)) != len(names):
        raise ValueError(
            f"Expected axes with a number of devices each, as 'data=4,model=2'. Received: {text!r}."
        )
    shape = [int(match[2]) for match in found if match]
    devices = keras.distribution.list_devices()
    if math.prod(shape) != len(devices):
        raise ValueError(
            f"Expected axes whose product is the number of devices, {len(devices)}. Received: "
            f"{text!r}, whose product is {math.prod(shape)}."
        )
    device_mesh = keras.distribution.DeviceMesh(shape, names, devices)
    axes_of(device_mesh)
    return device_mesh
