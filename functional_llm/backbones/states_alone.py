"""What the two Mambas share: layers of states alone, with neither attention nor MLPs."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from functional_llm.backbones.family import ModelConfig
from functional_llm.backbones.stacks import build_of_types
from functional_llm.backbones.state_spaces import residual_parts
from functional_llm.backbones.transforms import Rows
from functional_llm.blocks.attention import Shapes
from functional_llm.blocks.decoder import decoder
from functional_llm.blocks.language_model import Graph, StateType
from functional_llm.blocks.norm import rms_norm
from functional_llm.graph.composite import CompositeLayer
from functional_llm.graph.types import JSON

ANY_LENGTH = 2**20  # positions; a state has no number of them, and llama.cpp writes this one


@dataclass(frozen=True, kw_only=True)
class AloneConfig(ModelConfig):
    """The numbers of such a model, beside those of its layers' states."""

    use_bias: bool
    float32_residuals: bool


def build_alone(config: AloneConfig, mixer: Callable[[], CompositeLayer], keeps: Shapes) -> Graph:
    """Returns the graph of layers with neither attention nor MLPs.

    Args:
        config: The numbers of the model.
        mixer: Makes what each layer has.
        keeps: What that keeps.
    """
    residual = residual_parts(config.float32_residuals)
    norm = partial(rms_norm, config.layer_norm_epsilon)
    layers = [
        decoder(f"decoder_{i}", [[norm("mamba_norm"), mixer(), *residual]])
        for i in range(config.num_layers)
    ]
    of_one_type = [("linear_attention", layer) for layer in layers]
    types = {"linear_attention": (StateType(), keeps)}
    return build_of_types(config, of_one_type, types, embedding_parts=residual)


# Keys of both Mambas.
ALONE_KEYS: dict[str, str | type] = {
    "vocab_size": "vocabulary_size",
    "num_hidden_layers": "num_layers",
    "hidden_size": "hidden_dim",
    "layer_norm_epsilon": "layer_norm_epsilon",
    "hidden_act": "activation",
    "tie_word_embeddings": "tie_word_embeddings",
    "state_size": "state_dim",
    "conv_kernel": "convolution_width",
    "use_conv_bias": "convolution_bias",
    "use_bias": "use_bias",
    "residual_in_fp32": "float32_residuals",
    "expand": int,
    # How they are trained.
    **dict.fromkeys(("time_step_min", "time_step_max", "time_step_floor"), float),
    "rescale_prenorm_residual": object,
}
# Their defaults in Transformers.
ALONE_DEFAULTS: JSON = {
    "layer_norm_epsilon": 1e-5,
    "expand": 2,
    "conv_kernel": 4,
    "use_bias": False,
    "use_conv_bias": True,
    "hidden_act": "silu",
    "residual_in_fp32": True,
    "max_sequence_length": ANY_LENGTH,
}


def alone_rows(mixer: Rows) -> Rows:
    """Returns the rows of both Mambas' tensors, those of a mixer among them."""
    return [
        ("backbone.embeddings.weight", "token_embedding/embeddings", "same"),
        ("backbone.layers.{}.norm.weight", "decoder_{}/mamba_norm/scale", "same"),
        *mixer,
        ("backbone.norm_f.weight", "final_norm/scale", "same"),
        ("lm_head.weight", "head/kernel", "transpose"),
    ]
