"""Experts that training draws, where a model of this kind was trained so."""

import zlib
from typing import TypeVar

import keras

from functional_llm.graph.rewiring import rewire
from functional_llm.graph.selection import walk
from functional_llm.graph.types import Layer, Nested
from functional_llm.layers.sparse_mixer import SampledMixer, SparseMixer, UniformNoise

ModelT = TypeVar("ModelT", bound=keras.Model)


def draw_experts(model: ModelT, input_noise: float = 0.0, seed: int | None = None) -> ModelT:
    """Returns a model that draws experts in training, as Phi-3.5-MoE was trained.

    What a token goes through then depends on chance, among experts with nearly the best score; a
    gradient reaches the router though a choice has none. Without it, a model of this kind trains
    on the experts that it uses otherwise: the gradient is that of their weights.

    ```python
    drawing = flm.training.draw_experts(backbone, input_noise=0.01)
    drawing.compile("adamw")
    drawing.fit(token_ids)  # trains the backbone, whose weights it shares
    ```

    Args:
        model: A model with routers that choose one expert after the other. It stays as it is, and
            its weights are shared.
        input_noise: What goes into routers and experts is multiplied in training by numbers from 1
            - this to 1 + this. `input_jitter_noise` of a `config.json`.
        seed: Of the draws.

    Raises:
        ValueError: If there is no such router.
    """
    found = dict(walk(model, composites=True))
    mixers = [path for path, layer in found.items() if isinstance(layer, SparseMixer)]
    if not mixers:
        raise ValueError(
            "Expected a model whose routers choose one expert after the other (Phi-3.5-MoE). "
            "Received one without such routers: the others choose alike in training."
        )

    def seed_of(path: str) -> int | None:
        return None if seed is None else (seed + zlib.crc32(path.encode())) % 2**31

    def drawing(layer: SparseMixer, path: str) -> Layer:
        return SampledMixer(layer.noise, seed_of(path), name=layer.name)

    def with_noise(layer: Layer, path: str, inputs: Nested) -> Nested:
        noise = UniformNoise(input_noise, seed_of(path), name="input_noise")
        return layer({**inputs, "x": noise(inputs["x"])})

    drawn = rewire(model, drawing, where=lambda layer, path: isinstance(layer, SparseMixer))
    mlps = [path.rpartition("/")[0] for path in mixers]
    return rewire(drawn, call=with_noise, where=mlps) if input_noise else drawn
