"""How KerasHub describes the models of a family: one more column of the family's table.

A weight has the place that it has in a `.weights.h5` file of KerasHub, which is also the way to it
in a model in memory: the kind of its layer with a number, attributes from there on, and the number
of the variable: `layers/llama_transformer_decoder_1/_self_attention_layer/_query_dense/vars/0`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from functional_llm.backbones.transforms import Row, Rows, Transform, heads_first, split_axis
from functional_llm.blocks.rope import LinearScaling, Llama3Scaling, RopeScaling
from functional_llm.graph.types import JSON

REQUIRED = object()  # the default of an argument that must be there
EMBEDDING = "layers/reversible_embedding/vars/0"
HEAD = "layers/reversible_embedding/vars/1"


def _nothing_wrong(_: Any) -> Sequence[str]:
    return ()


def _nothing_computed(_: Any) -> Mapping[str, np.ndarray]:
    return {}


@dataclass(frozen=True, kw_only=True)
class KerasHub:
    """How KerasHub describes the models of a family.

    An argument that has the name of a field of our config is that field. What has no equal on the
    other side goes through `fields` and `written`; whoever reads or writes checks that the way back
    leads to where it began, so that nothing is dropped.

    Args:
        classes: Names of the backbone classes that are such models. We make the first.
        arguments: Argument of the class -> its default, or `REQUIRED`.
        fields: All arguments -> the fields of our config that are no argument, or another number.
        written: Config -> the arguments that are no field, or another number.
        weights: Config -> rows (place of a weight, path of our variable, transform); `{}` stands
            for the layer.
        wrong: Config -> what KerasHub's class computes otherwise than the model's authors.
        ignored: Arguments without a meaning for the models that can be read, or all of whose
            values `fields` reads.
        types: Types of arguments that are no field, where they are not just a number.
        computed: Config -> value of weights that follow from the arguments, by their place.
    """

    classes: Sequence[str]
    arguments: Mapping[str, Any]
    fields: Callable[[JSON], JSON]
    written: Callable[[Any], JSON]
    weights: Callable[[Any], Rows]
    wrong: Callable[[Any], Sequence[str]] = _nothing_wrong
    ignored: Sequence[str] = ()
    types: Mapping[str, Any] = field(default_factory=dict)
    computed: Callable[[Any], Mapping[str, np.ndarray]] = _nothing_computed


SIZES = "vocabulary_size num_layers hidden_dim intermediate_dim".split()
HEADS = ["num_query_heads", "num_key_value_heads"]
# Of most families, and of those with RoPE's positions divided by a factor.
ARGUMENTS = dict.fromkeys([*SIZES, *HEADS], REQUIRED) | {"layer_norm_epsilon": 1e-6}
ROPE_ARGUMENTS = ARGUMENTS | {"rope_max_wavelength": 10000, "rope_scaling_factor": 1.0}
# Name of an argument -> field of `Llama3Scaling`.
STRETCH = {
    "rope_frequency_adjustment_factor": "factor",
    "rope_low_freq_factor": "low_freq_factor",
    "rope_high_freq_factor": "high_freq_factor",
    "rope_pretraining_sequence_length": "original_max_sequence_length",
}


def llama_fields(arguments: JSON, max_sequence_length: int, **fields: Any) -> JSON:
    """Returns the fields of a Llama and its kin that KerasHub does not have.

    Args:
        arguments: All arguments of the class.
        max_sequence_length: The longest text of a published model: KerasHub states none.
        **fields: More fields.
    """
    stretch: JSON = {field: arguments.get(name) for name, field in STRETCH.items()}
    known: JSON = {
        "rope_scaling_factor": arguments.get("rope_position_scaling_factor", 1),
        **arguments,
    }
    return {
        "head_dim": arguments.get("head_dim")
        or arguments["hidden_dim"] // arguments["num_query_heads"],
        "rope_scaling": divided(known["rope_scaling_factor"])
        if None in stretch.values()
        else Llama3Scaling(**stretch),
        "max_sequence_length": max_sequence_length,
        "activation": "silu",
        **fields,
    }


def window_fields(arguments: JSON, slides: Sequence[bool]) -> JSON:
    """Returns the types of the layers, and the window.

    Args:
        arguments: All arguments of the class.
        slides: Whether each layer has the window.
    """
    kinds = ("sliding_attention" if x else "full_attention" for x in slides)
    return {"layer_types": tuple(kinds), "sliding_window": arguments["sliding_window_size"]}


def has_window(config: Any) -> bool:
    """Returns whether any layer has the window."""
    return "sliding_attention" in config.layer_types


def window_wrong(config: Any) -> list[str]:
    """Returns what a Qwen of KerasHub leaves out where JAX has an attention of its own."""
    return ["it has no window on JAX"] if has_window(config) else []


def stretch_arguments(config: Any) -> JSON:
    """Returns the scaling of a Llama's RoPE in KerasHub's words."""
    scaling = config.rope_scaling
    known = isinstance(scaling, Llama3Scaling)
    stretch = {name: getattr(scaling, x) if known else None for name, x in STRETCH.items()}
    return stretch | {"rope_position_scaling_factor": factor(scaling)}


def stretch_wrong(config: Any) -> list[str]:
    """Returns what KerasHub's rotary embedding of a Llama leaves out."""
    ignored = isinstance(config.rope_scaling, LinearScaling)
    return ["it ignores rope_position_scaling_factor"] if ignored else []


def factor_argument(config: Any) -> JSON:
    """Returns the factor on RoPE's positions."""
    return {"rope_scaling_factor": factor(config.rope_scaling)}


def divided(factor: float) -> RopeScaling | None:
    """Returns the scaling that KerasHub's factor on positions is."""
    return None if factor == 1 else LinearScaling(factor=factor)


def factor(scaling: RopeScaling | None) -> float:
    """Returns KerasHub's factor on positions; 1 for a scaling that is more than that."""
    return scaling.factor if isinstance(scaling, LinearScaling) else 1.0


# Arguments of a Gemma that the first Gemma leaves as they are; all that a Gemma 3 must have.
GEMMA2 = {
    "query_head_dim_normalize": True,
    "use_post_ffw_norm": False,
    "use_post_attention_norm": False,
    "attention_logit_soft_cap": None,
    "final_logit_soft_cap": None,
    "use_sliding_window_attention": False,
}
GEMMA_ARGUMENTS = {**ARGUMENTS, **GEMMA2, "head_dim": REQUIRED, "sliding_window_size": 4096}
GEMMA3 = {
    "use_query_key_norm": True,
    "local_rope_scaling_factor": 1.0,
    "vision_encoder": None,
    "use_bidirectional_attention": False,
    "is_embedding_model": False,
    "pooling_intermediate_dim": None,
    "embedding_dim": None,
}


def gemma_fields(arguments: JSON) -> JSON:
    """Returns the fields of a Gemma that KerasHub does not have."""
    return {
        "intermediate_dim": arguments["intermediate_dim"] // 2,  # KerasHub counts gate and up
        "activation": "gelu_approximate",
        "rope_max_wavelength": 10000.0,
        "rope_scaling": None,
        "tie_word_embeddings": True,
        "max_sequence_length": 8192,
    }


def gemma2_fields(arguments: JSON, slides: Callable[[int], bool]) -> JSON:
    """Returns the fields of a Gemma 2 or 3 beside those of a Gemma.

    Args:
        arguments: All arguments of the class.
        slides: Whether the layer of a number has the window, if there is one.
    """
    window = arguments["use_sliding_window_attention"]
    size = arguments["hidden_dim"] // arguments["num_query_heads"]
    by_head = arguments["query_head_dim_normalize"]
    return {
        **window_fields(arguments, [window and slides(i) for i in range(arguments["num_layers"])]),
        "query_pre_attention_scalar": arguments["head_dim"] if by_head else size,
    }


def gemma2_arguments(config: Any) -> JSON:
    """Returns the arguments of a Gemma 2 or 3 that have no field of the same name."""
    return {
        "query_head_dim_normalize": config.query_pre_attention_scalar == config.head_dim,
        "use_post_ffw_norm": True,
        "use_post_attention_norm": True,
        "use_sliding_window_attention": has_window(config),
        "sliding_window_size": config.sliding_window or 4096,
    }


def gemma_wrong(config: Any) -> list[str]:
    """Returns what KerasHub's decoder layers do whatever the arguments say."""
    scalar = getattr(config, "query_pre_attention_scalar", config.head_dim)
    found = []
    if scalar != config.head_dim:
        found.append(f"it scales scores by the head size {config.head_dim} instead of {scalar}")
    if config.layer_norm_epsilon != 1e-6:
        found.append("the norms of its decoder layers have an epsilon of 1e-6")
    return found


def dense(
    place: str, path: str, kernel: str | Transform = "same", bias: str | Transform = "same"
) -> list[Row]:
    """Returns the rows of a Dense or EinsumDense."""
    return [
        (f"{place}/vars/0", f"{path}/kernel", kernel),
        (f"{place}/vars/1", f"{path}/bias", bias),
    ]


def layer_norm(place: str, path: str) -> list[Row]:
    """Returns the rows of a LayerNormalization."""
    return [
        (f"{place}/vars/0", f"{path}/gamma", "same"),
        (f"{place}/vars/1", f"{path}/beta", "same"),
    ]


def heads(place: str, path: str, count: int, size: int) -> list[Row]:
    """Returns the rows of an EinsumDense (in, heads, size)."""
    return dense(place, path, split_axis(1, (count, size)), split_axis(0, (count, size)))


def llama_weights(layer: str, norm: str) -> Callable[[Any], Rows]:
    """Returns the weights of a Llama and its kin.

    Args:
        layer: Kind of the decoder layers.
        norm: Kind of the last norm.
    """

    def rows(config: Any) -> Rows:
        queries, keys, size = config.num_query_heads, config.num_key_value_heads, config.head_dim
        block, ours = f"layers/{layer}_{{}}", "decoder_{}"
        attention = f"{block}/_self_attention_layer"
        return [
            (EMBEDDING, "token_embedding/embeddings", "same"),
            (HEAD, "head/kernel", "same"),
            (f"{block}/_self_attention_layernorm/vars/0", f"{ours}/attention_norm/scale", "same"),
            *heads(f"{attention}/_query_dense", f"{ours}/attention/query", queries, size),
            *heads(f"{attention}/_key_dense", f"{ours}/attention/key", keys, size),
            *heads(f"{attention}/_value_dense", f"{ours}/attention/value", keys, size),
            *dense(
                f"{attention}/_output_dense",
                f"{ours}/attention/output",
                split_axis(0, (queries, size)),
            ),
            (
                f"{attention}/_query_dense_layer_norm/vars/0",
                f"{ours}/attention/query_norm/scale",
                "same",
            ),
            (
                f"{attention}/_key_dense_layer_norm/vars/0",
                f"{ours}/attention/key_norm/scale",
                "same",
            ),
            (f"{block}/_feedforward_layernorm/vars/0", f"{ours}/mlp_norm/scale", "same"),
            *dense(f"{block}/_feedforward_gate_dense", f"{ours}/mlp/gate"),
            *dense(f"{block}/_feedforward_intermediate_dense", f"{ours}/mlp/up"),
            *dense(f"{block}/_feedforward_output_dense", f"{ours}/mlp/down"),
            (f"layers/{norm}/vars/0", "final_norm/scale", "same"),
        ]

    return rows


def gemma_weights(layer: str) -> Callable[[Any], Rows]:
    """Returns the weights of a Gemma and its kin.

    Args:
        layer: Kind of the decoder layers.
    """
    norms = {
        "pre_attention_norm": "attention_norm",
        "post_attention_norm": "attention_post_norm",
        "pre_ffw_norm": "mlp_norm",
        "post_ffw_norm": "mlp_post_norm",
        "attention/query_norm": "attention/query_norm",
        "attention/key_norm": "attention/key_norm",
    }

    def rows(config: Any) -> Rows:
        queries, keys, size = config.num_query_heads, config.num_key_value_heads, config.head_dim
        block, ours = f"layers/{layer}_{{}}", "decoder_{}"
        attention = f"{block}/attention"
        return [
            (EMBEDDING, "token_embedding/embeddings", "same"),
            *(
                (f"{block}/{name}/vars/0", f"{ours}/{norm}/scale", "same")
                for name, norm in norms.items()
            ),
            *dense(
                f"{attention}/query_dense", f"{ours}/attention/query", heads_first(queries, size)
            ),
            *dense(f"{attention}/key_dense", f"{ours}/attention/key", heads_first(keys, size)),
            *dense(f"{attention}/value_dense", f"{ours}/attention/value", heads_first(keys, size)),
            *dense(
                f"{attention}/output_dense",
                f"{ours}/attention/output",
                split_axis(0, (queries, size)),
            ),
            *dense(f"{block}/gating_ffw", f"{ours}/mlp/gate"),
            *dense(f"{block}/gating_ffw_2", f"{ours}/mlp/up"),
            *dense(f"{block}/ffw_linear", f"{ours}/mlp/down"),
            ("layers/rms_normalization/vars/0", "final_norm/scale", "same"),
        ]

    return rows


def gpt2_weights(config: Any) -> Rows:
    """Returns the weights of a GPT-2."""
    count, size = config.num_heads, config.hidden_dim // config.num_heads
    block, ours = "layers/transformer_decoder_{}", "decoder_{}"
    attention = f"{block}/_self_attention_layer"
    return [
        (EMBEDDING, "token_embedding/embeddings", "same"),
        ("layers/position_embedding/vars/0", "position_embedding/embeddings", "same"),
        *layer_norm(f"{block}/_self_attention_layer_norm", f"{ours}/attention_norm"),
        *heads(f"{attention}/query_dense", f"{ours}/attention/query", count, size),
        *heads(f"{attention}/key_dense", f"{ours}/attention/key", count, size),
        *heads(f"{attention}/value_dense", f"{ours}/attention/value", count, size),
        *dense(
            f"{attention}/output_dense", f"{ours}/attention/output", split_axis(0, (count, size))
        ),
        *layer_norm(f"{block}/_feedforward_layer_norm", f"{ours}/mlp_norm"),
        *dense(f"{block}/_feedforward_intermediate_dense", f"{ours}/mlp/up"),
        *dense(f"{block}/_feedforward_output_dense", f"{ours}/mlp/down"),
        *layer_norm("layers/layer_normalization", "final_norm"),
    ]
