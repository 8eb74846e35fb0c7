"""The graph around decoder layers, as most families have it."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from functional_llm.backbones.family import (
    AnyConfig,
    DecoderConfig,
    ModelConfig,
    MultiHeadConfig,
)
from functional_llm.blocks.attention import Part, Shapes, key_value_shapes
from functional_llm.blocks.language_model import Graph, Kinds, LayerType, StateType, causal_lm
from functional_llm.blocks.norm import rms_norm
from functional_llm.blocks.rope import Rope
from functional_llm.graph.composite import CompositeLayer

# The same one throughout a signature.
AnyNumbers = TypeVar("AnyNumbers", bound=DecoderConfig | MultiHeadConfig)


def build_of_types(
    config: ModelConfig,
    layers: Sequence[tuple[Kinds, CompositeLayer]],
    types: Mapping[str, tuple[LayerType | StateType, Shapes]],
    norm: Callable[[float, str], Part] = rms_norm,
    **others: Any,
) -> Graph:
    """Returns the graph of layers that keep what others of their types keep, a norm behind them.

    Args:
        config: The numbers of the model.
        layers: As for `causal_lm`.
        types: Name of a type -> what its layers share, and what each of them keeps.
        norm: Epsilon and name -> the norm.
        **others: Other arguments of `causal_lm`, also in place of what follows from the numbers.
    """
    all_kinds = [(kind,) if isinstance(kind, str) else kind for kind, _ in layers]
    own: dict[str, Any] = {
        "hidden_dim": config.hidden_dim,
        "keeps": [[types[kind][1] for kind in kinds] for kinds in all_kinds],
        "final_norm": norm(config.layer_norm_epsilon, "final_norm"),
    }
    return causal_lm(
        vocabulary_size=config.vocabulary_size,
        layer_types={kind: layer_type for kind, (layer_type, _) in types.items()},
        layers=layers,
        tie_word_embeddings=config.tie_word_embeddings,
        **(own | others),
    )


def build_around(
    config: DecoderConfig | MultiHeadConfig,
    layers: Sequence[tuple[Kinds, CompositeLayer]],
    layer_types: Mapping[str, LayerType],
    norm: Callable[[float, str], Part] = rms_norm,
    **others: Any,
) -> Graph:
    """Returns the graph of layers with keys and values, a norm behind them.

    Args:
        config: The numbers of the model.
        layers: As for `causal_lm`.
        layer_types: As for `causal_lm`.
        norm: As for `build_of_types`.
        **others: As for `build_of_types`.
    """
    kept = key_value_shapes(config.num_key_value_heads, config.head_dim)
    types = {kind: (layer_type, kept) for kind, layer_type in layer_types.items()}
    return build_of_types(config, layers, types, norm, **others)


def build_alike(
    config: AnyNumbers,
    build_decoder: Callable[[AnyNumbers, str], CompositeLayer],
    norm: Callable[[float, str], Part],
    layer_type: LayerType,
    **others: Any,
) -> Graph:
    """Returns the graph of layers that are all of one type.

    Args:
        config: The numbers of the model.
        build_decoder: Config and name -> a layer.
        norm: As for `build_around`.
        layer_type: Of the layers.
        **others: As for `build_around`.
    """
    kind = "full_attention" if layer_type.window is None else "sliding_attention"
    layers = [(kind, build_decoder(config, f"decoder_{i}")) for i in range(config.num_layers)]
    return build_around(config, layers, {kind: layer_type}, norm, **others)


def build_with_one_rope(
    config: AnyConfig,
    build_decoder: Callable[[AnyConfig, str], CompositeLayer],
    kinds: Sequence[str],
    window: int | None = None,
) -> Graph:
    """Returns the graph of layers that share one RoPE.

    Args:
        config: The numbers of the model.
        build_decoder: Config and name -> a layer.
        kinds: The type of each layer: "full_attention", or "sliding_attention" for the window.
        window: Of the layers that have one.
    """
    layers = [(kind, build_decoder(config, f"decoder_{i}")) for i, kind in enumerate(kinds)]
    return build_around(config, layers, one_rope(config, window))


def one_rope(config: DecoderConfig, window: int | None = None) -> dict[str, LayerType]:
    """Returns the types of layers that share one RoPE: "sliding_attention" has the window."""
    return {"full_attention": with_rope(config), "sliding_attention": with_rope(config, window)}


def with_rope(config: DecoderConfig, window: int | None = None) -> LayerType:
    """Returns the type of layers with the RoPE of the numbers, and a window if there is one."""
    rope = Rope(config.rotary_dim, config.rope_max_wavelength, config.rope_scaling)
    return LayerType(rope, window)
