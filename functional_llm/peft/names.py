"""What PEFT's files call the parts of a model: its modules, its tensors, the model itself."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import keras
import numpy as np
from keras import ops

from functional_llm.formats.table_checks import entry_of, without_numbers
from functional_llm.formats.weight_table import Assembly, Tensor
from functional_llm.graph import placing
from functional_llm.graph.selection import walk
from functional_llm.graph.types import Layer
from functional_llm.peft.adapter import REVERSED, origin_of
from functional_llm.peft.linear import MATRIX_LAYERS, Linear, view


def _nothing(folder: Path) -> None:
    """Writes no tokenizer."""


@dataclass(frozen=True)
class Names:
    """The names for one model. A Backbone of a family has them; other models have their paths.

    Args:
        modules: Path of a layer with a matrix -> name of its module; a fused module has several
            paths, in order. A path with ":reverse" behind is the head that an embedding is.
        tensors: The tensors of a checkpoint, and which variables each holds.
        parameters: Tensors that are parameters in Transformers' model, and not weights of a Linear:
            those of experts and routers, under the names that they have there. Those of one module
            in its order.
        inputs_first: Whether Transformers says of its experts that their matrices are (in, out).
        tied: Name of the tensor of a head that has none of its own, and of that which it is.
        base: What Transformers opens as the model: an id of the Hub, or a directory.
        revision: Of the id.
        licence: Of the model, if it is known.
        write_tokenizer: Writes the files of the model's tokenizer into a folder, if it has one.
    """

    modules: Mapping[str, str] = field(default_factory=dict)
    tensors: Sequence[Tensor] = ()
    parameters: Sequence[Tensor] = ()
    inputs_first: bool = False
    tied: tuple[str, str] | None = None
    base: str | None = None
    revision: str | None = None
    licence: str | None = None
    write_tokenizer: Callable[[Path], None] = _nothing


class NamedModel:
    """A model whose parts have names in PEFT's files.

    Args:
        model: A functional model; with the property `peft_names`, if it has any.
    """

    def __init__(self, model: keras.Model) -> None:
        self.names: Names = getattr(model, "peft_names", Names())
        self._layers: dict[str, Layer] = {path: origin_of(x) for path, x in walk(model)}
        modules = {
            path: module
            for path, module in self.names.modules.items()
            if path.removesuffix(REVERSED) in self._layers
        }
        for path, layer in self._layers.items():
            if isinstance(layer, MATRIX_LAYERS):
                modules.setdefault(path, path.replace("/", "."))
        self.parameters = {x.name.removesuffix(".weight"): x for x in self.names.parameters}
        for module, tensor in self.parameters.items():
            modules |= {path.rpartition("/")[0]: module for path in tensor.paths}
        self.modules = modules
        self.paths_of: dict[str, list[str]] = {}
        for path, module in modules.items():
            self.paths_of.setdefault(module, []).append(path)
        self.variables = {
            f"{path}/{v.name}": v for path, layer in self._layers.items() for v in layer.weights
        }
        self.tensors = {tensor.name: tensor for tensor in self.names.tensors}

    def linear(self, path: str) -> Linear:
        """Returns the view of the layer at a path; behind ":reverse", of the head that it is."""
        return view(self._layers[path.removesuffix(REVERSED)], path.endswith(REVERSED))

    def weight_names(self, path: str) -> list[str]:
        """Returns the names of all weights of the layer at a path."""
        return [v.name for v in self._layers[path].weights]

    def split_outputs(
        self, module: str, array: np.ndarray, sizes: Sequence[int]
    ) -> list[np.ndarray]:
        """Returns the part of each layer that a fused module is, of an array (..., outputs)."""
        return self._tensor(module).transform.parts(array, sizes, -1)

    def join_outputs(self, module: str, arrays: Sequence[np.ndarray]) -> np.ndarray:
        """Returns the array (..., outputs) of a module, of one for each of its layers."""
        if len(arrays) == 1:
            return arrays[0]
        return self._tensor(module).transform.whole(arrays, -1)

    def _tensor(self, module: str) -> Tensor:
        return self.parameters.get(module) or self.tensors[f"{module}.weight"]

    def experts_of(self, module: str) -> list[Linear]:
        """Returns the views of the experts that a parameter holds; none if it holds no experts."""
        if module not in self.parameters:
            return []
        return [x for path in self.paths_of[module] if (x := self.linear(path)).stack]

    def a_is_of_inputs(self, module: str, inputs_first: bool) -> bool:
        """Whether PEFT's A of a parameter of experts multiplies the inputs of the matrices.

        Args:
            module: The parameter.
            inputs_first: Whether PEFT believes that the parameter is (E, in, out).
        """
        return self._tensor(module).transform.swaps != inputs_first

    def entry_of(self, module: str) -> str:
        """Returns which expert a module would be that the model lacks, in words, or nothing."""
        entries = {without_numbers(x.name): x for x in self.names.tensors if x.entry}
        return entry_of(f"{module}.weight", entries)

    def assembly(self) -> Assembly:
        """Returns what puts variables together that are several tensors."""
        return Assembly({path: tuple(v.shape) for path, v in self.variables.items()})

    def split(
        self, name: str, array: np.ndarray, assembly: Assembly
    ) -> Iterator[tuple[str, np.ndarray]]:
        """Returns path and value of each variable that is complete with a tensor of a checkpoint.

        Args:
            name: Its name.
            array: The tensor.
            assembly: Of all tensors of the file.

        Raises:
            ValueError: If the tensor has another shape than the model's, or no layer alone has it.
        """
        tensor = self.tensors[name]
        within = [path for path in tensor.paths if path not in self.variables]
        if within:
            raise ValueError(
                f"tensor '{name}': expected one of a layer that an adapter can take the place of, "
                f"received {within[0]}, which is within one"
            )
        shapes = {path: tuple(self.variables[path].shape) for path in tensor.paths}
        if (expected := tensor.shape(shapes)) != array.shape:
            raise ValueError(f"tensor '{name}': expected shape {expected}, received {array.shape}")
        return assembly.add(tensor, tensor.split(array, tensor.sizes(shapes)))

    def join(self, name: str, values: Mapping[str, np.ndarray]) -> np.ndarray:
        """Returns a tensor of a checkpoint, with the model's values where none is given."""
        paths = self.tensors[name].paths
        own = [values[x] if x in values else to_numpy(self.variables[x]) for x in paths]
        return self.tensors[name].join(own)


def to_numpy(x: object) -> np.ndarray:
    """Returns an array or a variable as NumPy, in float32."""
    return placing.to_numpy(ops.cast(x, "float32"))
