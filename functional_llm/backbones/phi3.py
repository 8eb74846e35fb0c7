"""Phi 3, 3.5, 4, 4-mini: a Llama whose RoPE may turn a part of each head, and stretches (LongRoPE).

Checkpoints hold queries, keys and values as one tensor, and gate and up as another. References:
[Phi-3](https://arxiv.org/abs/2404.14219), [Phi-4](https://arxiv.org/abs/2412.08905),
[Phi-4-mini](https://arxiv.org/abs/2503.01743).
"""

from dataclasses import dataclass
from functools import partial

from functional_llm.backbones import llama, mistral
from functional_llm.backbones.family import (
    COMMON_KEYS,
    Family,
    PartialRotaryConfig,
    complete_common_keys,
    dense_rows,
    fused_rows,
)
from functional_llm.backbones.keras_hub import llamas
from functional_llm.backbones.transforms import fused
from functional_llm.blocks.language_model import Graph
from functional_llm.blocks.rope import on_first_channels, rotary
from functional_llm.blocks.rope_scaling import LongRopeScaling
from functional_llm.graph.types import JSON


@dataclass(frozen=True, kw_only=True)
class Config(PartialRotaryConfig, mistral.Config):
    """The numbers of a Phi 3."""


def build(config: Config) -> Graph:
    """Returns the inputs and outputs of the graph."""
    rotate = on_first_channels(rotary())
    return mistral.build_stack(config, partial(llama.build_decoder, rotate=rotate))


def complete_keys(keys: JSON) -> JSON:
    """Adds Transformers' defaults for keys that a `config.json` leaves out."""
    own: JSON = {"rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "sliding_window": None}
    own |= {"original_max_position_embeddings": 4096, "partial_rotary_factor": 1.0}
    return complete_common_keys(own | keys)


def written_keys(config: Config) -> JSON:
    """Returns what Transformers reads beside RoPE's own parameters."""
    scaling = config.rope_scaling
    if not isinstance(scaling, LongRopeScaling):
        return {}
    return {"original_max_position_embeddings": scaling.original_max_sequence_length}


_ATTENTION, _MLP = "model.layers.{}.self_attn.qkv_proj", "model.layers.{}.mlp.gate_up_proj"
GATE_AND_UP = [
    *dense_rows(_MLP, "decoder_{}/mlp/gate", *fused()),
    *dense_rows(_MLP, "decoder_{}/mlp/up", *fused()),
]
_PARTS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
WEIGHTS = [
    *(row for row in llama.WEIGHTS if not any(part in row[0] for part in _PARTS)),
    *fused_rows(_ATTENTION, "decoder_{}/attention"),
    *GATE_AND_UP,
]

FAMILY = Family(
    model_type="phi3",
    architecture="Phi3ForCausalLM",
    models="Phi 3, 3.5, 4, 4-mini",
    config_class=Config,
    build=build,
    config_keys={
        **COMMON_KEYS,
        "sliding_window": "sliding_window",
        "partial_rotary_factor": "partial_rotary_factor",
        "original_max_position_embeddings": int,
    },
    # Of the last three, in Phi-4-mini's file, Microsoft's own code reads only the head's.
    config_constants={
        **mistral.NO_BIASES,
        "lm_head_bias": False,
        "full_attn_mod": 1,
        "interpolate_factor": 1,
    },
    complete_keys=complete_keys,
    written_keys=written_keys,
    weights=WEIGHTS,
    ignored=llama.FAMILY.ignored,
    gguf_architecture="phi3",
    keras_hub=llamas.PHI3,
)
