"""Mamba-2: neither attention nor MLPs; each layer reads and writes states of one size.

References: [Mamba-2](https://arxiv.org/abs/2405.21060),
[Codestral Mamba](https://mistral.ai/news/codestral-mamba).
"""

from dataclasses import dataclass
from functools import partial

from functional_llm.backbones import state_spaces
from functional_llm.backbones.family import Family
from functional_llm.backbones.state_spaces import SpaceConfig
from functional_llm.backbones.states_alone import (
    ALONE_DEFAULTS,
    ALONE_KEYS,
    AloneConfig,
    alone_rows,
    build_alone,
)
from functional_llm.blocks.language_model import Graph
from functional_llm.blocks.mamba2 import mamba2_shapes
from functional_llm.graph.types import JSON


@dataclass(frozen=True, kw_only=True)
class Config(SpaceConfig, AloneConfig):
    """The numbers of a Mamba-2."""


def build(config: Config) -> Graph:
    """Returns the inputs and outputs of the graph."""
    mixer = partial(
        state_spaces.build_states, config, config.use_bias, activation=config.activation
    )
    return build_alone(config, mixer, mamba2_shapes(config.state_sizes))


def complete_keys(keys: JSON) -> JSON:
    """Adds Transformers' defaults for keys that a `config.json` leaves out."""
    own: JSON = {
        "num_heads": 128,
        "head_dim": 64,
        "state_size": 128,
        "n_groups": 8,
        "tie_word_embeddings": False,
    }
    keys = ALONE_DEFAULTS | own | keys
    inner = int(keys["expand"] * keys["hidden_size"])
    state_spaces.check_heads(keys, "num_heads", "n_groups", inner, keys["head_dim"])
    return {**keys, "intermediate_dim": inner, **state_spaces.read_steps(keys)}


_MIXER = "backbone.layers.{}.mixer"
FAMILY = Family(
    model_type="mamba2",
    architecture="Mamba2ForCausalLM",
    models="Codestral Mamba 7B",
    config_class=Config,
    build=build,
    config_keys={
        **ALONE_KEYS,
        "num_heads": "num_state_heads",
        "head_dim": "state_head_dim",
        "n_groups": "num_state_groups",
        "time_step_limit": object,
        # In which portions others compute, and what nobody does.
        **dict.fromkeys(("chunk_size", "time_step_rank"), object),
    },
    config_nulls=["time_step_limit"],
    complete_keys=complete_keys,
    written_keys=lambda config: {
        "expand": config.intermediate_dim // config.hidden_dim,
        **state_spaces.written_steps(config),
    },
    weights=alone_rows(state_spaces.mixer_rows(_MIXER)),
    base_prefix="backbone.",
    gguf_architecture="mamba2",
    gguf_keys={**state_spaces.GGUF_KEYS, "attention.layer_norm_rms_epsilon": "layer_norm_epsilon"},
    gguf_ignored=["context_length", "feed_forward_length", "attention.head_count"],
    gguf_given=state_spaces.gguf_given,
    gguf_rows=state_spaces.gguf_mixer_rows(_MIXER),
)
