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
    """How long each axis of a mesh is, by what it is for; 1 for those that it lacks.

    Args:
        sizes: Name of an axis -> devices along it.
    """

    sizes: dict[str, int]

    def __getitem__(self, name: str) -> int:
        return self.sizes.get(name, 1)

    @property
    def of_rows(self) -> tuple[str, ...]:
        """The axes that split the rows of a batch."""
        return tuple(name for name in self.sizes if name in (DATA, FSDP))

    @property
    def of_weights(self) -> tuple[str, ...]:
        """The axes that split weights."""
        return tuple(name for name, size in self.sizes.items() if name != DATA and size > 1)


def axes_of(device_mesh: keras.distribution.DeviceMesh) -> Axes:
    """Returns the axes of a mesh.

    Raises:
        ValueError: If one of them has a name that says nothing of what it is for.
    """
    names = list(device_mesh.axis_names)
    unknown = [name for name in names if name not in _MEANING]
    if unknown:
        known = "; ".join(f"'{name}' ({what})" for name, what in _MEANING.items())
        raise ValueError(
            f"Expected a mesh whose axes are among {known}. Received: {names}, of which {unknown} "
            "are unknown."
        )
    return Axes(dict(zip(names, device_mesh.shape, strict=True)))


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
