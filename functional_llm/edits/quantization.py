"""Quantising: a model whose matrices are int8 or int4, as a rewiring.

Stock Dense layers and embeddings can hold int8, with one scale for each output channel, by which
the output is divided; and int4, two numbers in a byte, with a scale and a zero for each group of
inputs to a channel (`Int4Dense` has a float in the place of the zero). Everything else stays in the
model's own precision, the inputs too: some inputs of language models are far larger than the rest,
and beside those, int8 rounds the rest away (a perplexity of 82.5 rose by 3.5; with int8 in the
matrices alone, by 0.3).

On CPUs with instructions for it, several rows of inputs are rounded to bfloat16 beside int8: see
`Int8AsHalf`.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import keras
import numpy as np
from keras import ops

from functional_llm.edits.quantized_layers import (
    MATRICES,
    QUANTIZABLE,
    group_size,
    make_uninitialized,
    mode_of,
    set_matrix,
    takes_grids,
)
from functional_llm.formats.grid import Grid
from functional_llm.graph.backend import require_jax
from functional_llm.graph.placing import to_numpy
from functional_llm.graph.rewiring import rewire
from functional_llm.graph.selection import Where, select, walk
from functional_llm.graph.types import Layer
from functional_llm.layers.experts import ExpertDense, ExpertScores

_DEFAULT_SIZE = 32


def quantize(model: keras.Model, mode: str = "int8", where: Where | None = None) -> keras.Model:
    """Returns a model with quantised matrices; what is not quantised is shared with the original.

    Only weights are quantised. In int8, each output channel becomes `round(column * scale)` with
    `scale = 127 / max(abs(column))` (absmax quantisation, section 2 of
    [LLM.int8()](https://arxiv.org/abs/2208.07339)). In int4, each group of inputs to a channel gets
    the grid `scale * (integer + 8) + offset` that it lies on, as numbers from a GGUF file of 4 bits
    do, or else the one with 0 on it that has the smallest squares of errors; embeddings and the
    head are int8 then, unless `where` says which layers; matrices of experts always are. A stock
    file of the model multiplies float32 by int8, which JAX refuses if `jax_numpy_dtype_promotion`
    is "strict".

    Quantised weights do not train. Adapters can be attached on top; merging them turns the layers
    under them back to the original precision.

    Args:
        model: A functional model without adapters. It stays as it is.
        mode: `"int8"`, `"int4"` in groups of 32 inputs, or `"int4/64"` in groups of 64: any even
            number that divides the inputs of each layer.
        where: Which layers, as for `flm.select`. Defaults to all that can be and are not yet.

    Raises:
        RuntimeError: With another backend than JAX.
        ValueError: At another mode, or groups that do not divide the inputs of a layer, or if no
            layer can be quantised, or a layer is quantised already or computes in float16, or the
            model has adapters.
    """
    require_jax("flm.quantize")
    modes = choose_modes(model, mode, where)
    return rewire(
        model,
        lambda layer, path: _quantize_layer(layer, modes[path]),
        where=lambda _, path: path in modes,
    )


def choose_modes(model: keras.Model, mode: str, where: Where | None = None) -> dict[str, str]:
    """Returns the paths of the layers that `quantize` quantises, and the mode of each.

    Args:
        model: A functional model, whose variables need no values.
        mode: As for `quantize`.
        where: As for `quantize`.

    Raises:
        ValueError: As `quantize`.
    """
    mode = check_mode(mode)
    found = dict(walk(model)) if where is None else select(model, where)
    layers = {path: layer for path, layer in found.items() if _is_quantizable(layer)}
    if adapted := [path for path, layer in walk(model) if hasattr(layer, "adapter_weights")]:
        raise ValueError(
            f"Expected a model without adapters. Received one with adapters at "
            f"{', '.join(adapted[:8])}: quantise first and attach them then, or merge them."
        )
    done = [path for path, layer in layers.items() if layer.quantization_mode is not None]
    if where is None and len(done) < len(layers):  # the rest, as after a first call with `where`
        layers = {path: layer for path, layer in layers.items() if path not in done}
    elif done or not layers:
        raise ValueError(
            "Expected Dense layers and embeddings that are not quantised yet. Received: "
            f"{', '.join((done or list(found))[:8])}."
        )
    if half := [path for path, layer in layers.items() if layer.compute_dtype == "float16"]:
        raise ValueError(
            f"Expected layers that compute in float32 or bfloat16: scales of integers leave the "
            f"range of float16. Received float16 at {', '.join(half[:8])}: load the model in "
            "another dtype."
        )
    keep = where is None and mode != "int8"
    modes = {
        path: "int8"
        if isinstance(layer, ExpertDense) or keep and _is_of_tokens(model, layer)
        else mode
        for path, layer in layers.items()
    }
    _check_groups(layers, modes)
    return modes


def quantized_bytes(model: keras.Model, mode: str, width: int) -> int:
    """Returns how many bytes the weights of a model would take, were it quantised.

    Args:
        model: A functional model, whose variables need no values.
        mode: As for `quantize`.
        width: Bytes of a number that is not quantised.

    Raises:
        ValueError: As `quantize`.
    """
    layers = dict(walk(model))
    new = {
        path: make_uninitialized(layers[path], x) for path, x in choose_modes(model, mode).items()
    }
    quantized = {id(variable) for path in new for variable in layers[path].variables}
    variables = [x for x in model.variables if id(x) not in quantized]
    variables += [variable for layer in new.values() for variable in layer.variables]
    narrow = {"int8": 1, "float16": 2}  # whatever the rest is in
    return sum(math.prod(x.shape) * narrow.get(x.dtype, width) for x in variables)


def check_mode(mode: object) -> str:
    """Returns a mode with the size of its groups; another one is a `ValueError`."""
    if mode == "int4":
        return f"int4/{_DEFAULT_SIZE}"
    size = re.fullmatch(r"int4/([0-9]*[02468])", mode) if isinstance(mode, str) else None
    if mode != "int8" and (size is None or int(size[1]) == 0):
        raise ValueError(
            f"Expected mode 'int8', 'int4', or 'int4/64' for groups of 64 inputs, an even number. "
            f"Received: {mode!r}."
        )
    return str(mode)


def _is_quantizable(layer: Layer) -> bool:
    return isinstance(layer, QUANTIZABLE) and not isinstance(layer, ExpertScores)


def _is_of_tokens(model: keras.Model, layer: Layer) -> bool:
    """Whether a layer is an embedding or a head, which int4 costs most (see the log)."""
    if isinstance(layer, keras.layers.Embedding):
        return True
    output = getattr(model, "output", None)
    return isinstance(output, dict) and layer.units == output["logits"].shape[-1]


def _check_groups(layers: Mapping[str, Layer], modes: Mapping[str, str]) -> None:
    wrong = {}
    for path, layer in layers.items():
        is_embedding = isinstance(layer, keras.layers.Embedding)
        inputs = layer.output_dim if is_embedding else layer.kernel.shape[0]
        size = group_size(modes[path])
        if size and inputs % size:
            wrong[f"'{path}' has {inputs}"] = size
    if wrong:
        raise ValueError(
            f"Expected groups that divide the inputs of each layer. Received groups of "
            f"{set(wrong.values()).pop()}, but {', '.join(list(wrong)[:8])}. Say another size, as "
            "in 'int4/64', or with `where` which layers."
        )


def quantized_modes(
    model: keras.Model, origin: Callable[[Layer], Layer] = lambda layer: layer
) -> dict[str, str]:
    """Returns the paths of the layers that are quantised, and the mode of each.

    Args:
        model: A functional model.
        origin: `origin(layer)` is the layer to look at in the place of `layer`.
    """
    modes = ((path, mode_of(origin(layer))) for path, layer in walk(model))
    return {path: mode for path, mode in modes if mode is not None}


def with_uninitialized(model: keras.Model, modes: Mapping[str, str]) -> keras.Model:
    """Returns the model with quantised layers at these paths; their weights are yet to be loaded.

    Args:
        model: A functional model.
        modes: Path of a layer -> its mode, as from `choose_modes`.
    """
    if not modes:
        return model
    return rewire(
        model,
        lambda layer, path: make_uninitialized(layer, modes[path]),
        where=lambda _, path: path in modes,
    )


@dataclass(frozen=True)
class QuantizedMatrix:
    """A quantised matrix as what loads weights sees a variable: floats go in.

    Args:
        layer: The layer that holds it.
        variable: The integers in it.
        shape: The shape of the floats.
    """

    layer: Layer
    variable: keras.Variable
    shape: tuple[int, ...]
    dtype: str = "float32"

    @property
    def path(self) -> str:
        """The path of the variable."""
        return self.variable.path

    @property
    def takes_grids(self) -> bool:
        """Whether it takes integers of a file as they are."""
        return takes_grids(self.layer)

    def assign(self, value: np.ndarray | Grid) -> None:
        """Rounds the floats and lets them go; the integers of a grid stay."""
        set_matrix(self.layer, self.variable.name, value)


def to_load(model: keras.Model, plain: keras.Model) -> list[keras.Variable | QuantizedMatrix]:
    """Returns what a checkpoint is loaded into: variables, and in the place of some a matrix.

    Args:
        model: A model from `with_uninitialized`.
        plain: The one it was made of.
    """
    shapes = {variable.path: tuple(variable.shape) for variable in plain.variables}
    own = {id(x.variable): x for _, layer in walk(model) for x in _matrices(layer, shapes)}
    targets = (own.get(id(variable), variable) for variable in model.variables)
    return [target for target in targets if target.path in shapes]


def _matrices(layer: Layer, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[QuantizedMatrix]:
    if mode_of(layer) is not None:
        for variable in layer.weights:
            if variable.name in MATRICES:
                yield QuantizedMatrix(layer, variable, shapes[variable.path])


def _quantize_layer(layer: Layer, mode: str) -> Layer:
    """Keras's `layer.quantize` collects garbage at each call, and takes ten times as long."""
    new = make_uninitialized(layer, mode)
    values = {variable.name: variable for variable in layer.weights}
    for variable in new.weights:
        if variable.name in MATRICES:
            set_matrix(new, variable.name, to_numpy(values[variable.name]))
        elif variable.name in values:
            variable.assign(ops.copy(values[variable.name]))  # training deletes the array of one
    return new
