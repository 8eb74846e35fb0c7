"""Mamba: neither attention nor MLPs; each layer reads and writes a few numbers for each channel.

Reference: [Mamba](https://arxiv.org/abs/2312.00752).
"""

from dataclasses import dataclass

from functional_llm.backbones.family import Family, dense_rows
from functional_llm.backbones.states_alone import (
    ALONE_DEFAULTS,
    ALONE_KEYS,
    AloneConfig,
    alone_rows,
    build_alone,
)
from functional_llm.backbones.transforms import Rows
from functional_llm.blocks.language_model import Graph
from functional_llm.blocks.mamba import ScanSizes, mamba, mamba_shapes
from functional_llm.graph.composite import CompositeLayer
from functional_llm.graph.types import JSON


@dataclass(frozen=True, kw_only=True)
class Config(AloneConfig):
    """The numbers of a Mamba, beside those of every model."""

    state_dim: int
    step_rank: int
    convolution_width: int
    convolution_bias: bool

    @property
    def sizes(self) -> ScanSizes:
        """The sizes of a layer."""
        return ScanSizes(
            channels=self.intermediate_dim,
            state_dim=self.state_dim,
            step_rank=self.step_rank,
            width=self.convolution_width,
        )


def build(config: Config) -> Graph:
    """Returns the inputs and outputs of the graph."""

    def mixer() -> CompositeLayer:
        return mamba(
            config.sizes,
            config.hidden_dim,
            activation=config.activation,
            use_bias=config.use_bias,
            convolution_bias=config.convolution_bias,
        )

    return build_alone(config, mixer, mamba_shapes(config.sizes))


def complete_keys(keys: JSON) -> JSON:
    """Adds Transformers' defaults for keys that a `config.json` leaves out."""
    own = {"state_size": 16, "tie_word_embeddings": True, "time_step_rank": "auto"}
    keys = ALONE_DEFAULTS | own | keys
    rank, width = keys["time_step_rank"], keys["expand"] * keys["hidden_size"]
    rank = -(-keys["hidden_size"] // 16) if rank == "auto" else rank
    if type(rank) is not int or rank < 1 or width < 1:
        raise ValueError(
            "config.json: expected time_step_rank to be 'auto' or a positive integer, and expand "
            f"times hidden_size at least 1. Received {rank!r} and {width}."
        )
    if keys.get("intermediate_size", width) != width:
        raise ValueError(
            f"config.json: expected intermediate_size to be expand times hidden_size, {width}. "
            f"Received {keys['intermediate_size']}."
        )
    widths = {"intermediate_size": width, "intermediate_dim": width}
    return {**keys, **widths, "step_rank": rank}


_MIXER, _MAMBA = "backbone.layers.{}.mixer", "decoder_{}/mamba"
WEIGHTS: Rows = [
    *dense_rows(f"{_MIXER}.in_proj", f"{_MAMBA}/input"),
    (f"{_MIXER}.conv1d.weight", f"{_MAMBA}/convolution/kernel", "depthwise"),
    (f"{_MIXER}.conv1d.bias", f"{_MAMBA}/convolution/bias", "same"),
    (f"{_MIXER}.x_proj.weight", f"{_MAMBA}/selection/kernel", "transpose"),
    (f"{_MIXER}.dt_proj.weight", f"{_MAMBA}/step/kernel", "transpose"),
    (f"{_MIXER}.dt_proj.bias", f"{_MAMBA}/scan/dt_bias", "same"),
    (f"{_MIXER}.A_log", f"{_MAMBA}/scan/a_log", "same"),
    (f"{_MIXER}.D", f"{_MAMBA}/scan/d", "same"),
    *dense_rows(f"{_MIXER}.out_proj", f"{_MAMBA}/output"),
]

FAMILY = Family(
    model_type="mamba",
    architecture="MambaForCausalLM",
    models="Mamba 130M–2.8B",
    config_class=Config,
    build=build,
    config_keys={
        **ALONE_KEYS,
        "intermediate_size": int,
        "time_step_rank": object,
        # How they are trained, and how others compute.
        **dict.fromkeys(("time_step_scale", "time_step_init_scheme", "use_mambapy"), object),
        **dict.fromkeys(("use_associative_scan", "fused_add_norm"), object),
        "pad_vocab_size_multiple": object,
    },
    # Of the first files, under their makers' own names, and of GGUF files of Falcon Mamba.
    config_ignored={
        "d_model": "hidden_size",
        "d_inner": "intermediate_size",
        "n_layer": "num_hidden_layers",
    },
    config_constants={"ssm_cfg": {}, "rms_norm": True, "dt_b_c_rms": False},
    config_nulls=(),
    complete_keys=complete_keys,
    written_keys=lambda config: {
        "expand": config.intermediate_dim // config.hidden_dim,
        "intermediate_size": config.intermediate_dim,
        "time_step_rank": config.step_rank,
    },
    weights=alone_rows(WEIGHTS),
    base_prefix="backbone.",
    gguf_architecture="mamba",
    gguf_given=lambda given: {
        "ssm.expand": given["ssm.inner_size"] // given["embedding_length"],
        **{key: x for key, x in given.items() if key != "ssm.inner_size"},
    },
    gguf_keys={
        "attention.layer_norm_rms_epsilon": "layer_norm_epsilon",
        "ssm.conv_kernel": "conv_kernel",
        "ssm.state_size": "state_size",
        "ssm.time_step_rank": "time_step_rank",
        "ssm.expand": "expand",
        "ssm.dt_b_c_rms": "dt_b_c_rms",
    },
    gguf_ignored=["context_length", "feed_forward_length", "attention.head_count"],
    gguf_rows=lambda config: [
        (f"{_MIXER}.conv1d.weight", f"{_MAMBA}/convolution/kernel", "transpose"),
        (f"{_MIXER}.A_log", f"{_MAMBA}/scan/a_log", "log_of_negative"),
    ],
)
