"""Mamba: neither attention nor MLPs; each layer reads and writes a few numbers for each channel.

Reference: [Mamba](https://arxiv.org/abs/2312.00752).
"""

from dataclasses import dataclass

from functional_llm.backbones.family import Family, ModelConfig, dense_rows
from functional_llm.backbones.state_spaces import ANY_LENGTH, residual_parts
from functional_llm.backbones.transforms import Rows
from functional_llm.blocks.decoder import decoder
from functional_llm.blocks.language_model import Graph, StateType, causal_lm
from functional_llm.blocks.mamba import ScanSizes, mamba, mamba_shapes
from functional_llm.blocks.norm import rms_norm
from functional_llm.graph.composite import CompositeLayer
from functional_llm.graph.types import JSON


@dataclass(frozen=True, kw_only=True)
class Config(ModelConfig):
    """The numbers of a Mamba, beside those of every model."""

    state_dim: int
    step_rank: int
    convolution_width: int
    convolution_bias: bool
    use_bias: bool
    float32_residuals: bool

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
    return causal_lm(
        vocabulary_size=config.vocabulary_size,
        hidden_dim=config.hidden_dim,
        layer_types={"linear_attention": StateType()},
        layers=[("linear_attention", build_decoder(config, i)) for i in range(config.num_layers)],
        keeps=mamba_shapes(config.sizes),
        final_norm=rms_norm(config.layer_norm_epsilon, "final_norm"),
        tie_word_embeddings=config.tie_word_embeddings,
        embedding_parts=residual_parts(config.float32_residuals),
    )


def build_decoder(config: Config, index: int) -> CompositeLayer:
    """Returns the decoder layer of this number."""
    mixer = mamba(
        config.sizes,
        config.hidden_dim,
        activation=config.activation,
        use_bias=config.use_bias,
        convolution_bias=config.convolution_bias,
    )
    norm = rms_norm(config.layer_norm_epsilon, "mamba_norm")
    return decoder(f"decoder_{index}", [[norm, mixer, *residual_parts(config.float32_residuals)]])


def complete_keys(keys: JSON) -> JSON:
    """Adds Transformers' defaults for keys that a `config.json` leaves out."""
    own: JSON = {
        "state_size": 16,
        "layer_norm_epsilon": 1e-5,
        "expand": 2,
        "conv_kernel": 4,
        "use_bias": False,
        "use_conv_bias": True,
        "hidden_act": "silu",
        "residual_in_fp32": True,
        "tie_word_embeddings": True,
        "time_step_rank": "auto",
        "max_sequence_length": ANY_LENGTH,
    }
    keys = own | keys
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


_LAYER = "backbone.layers.{}"
_MIXER, _MAMBA = f"{_LAYER}.mixer", "decoder_{}/mamba"
WEIGHTS: Rows = [
    ("backbone.embeddings.weight", "token_embedding/embeddings", "same"),
    (f"{_LAYER}.norm.weight", "decoder_{}/mamba_norm/scale", "same"),
    *dense_rows(f"{_MIXER}.in_proj", f"{_MAMBA}/input"),
    (f"{_MIXER}.conv1d.weight", f"{_MAMBA}/convolution/kernel", "depthwise"),
    (f"{_MIXER}.conv1d.bias", f"{_MAMBA}/convolution/bias", "same"),
    (f"{_MIXER}.x_proj.weight", f"{_MAMBA}/selection/kernel", "transpose"),
    (f"{_MIXER}.dt_proj.weight", f"{_MAMBA}/step/kernel", "transpose"),
    (f"{_MIXER}.dt_proj.bias", f"{_MAMBA}/scan/dt_bias", "same"),
    (f"{_MIXER}.A_log", f"{_MAMBA}/scan/a_log", "same"),
    (f"{_MIXER}.D", f"{_MAMBA}/scan/d", "same"),
    *dense_rows(f"{_MIXER}.out_proj", f"{_MAMBA}/output"),
    ("backbone.norm_f.weight", "final_norm/scale", "same"),
    ("lm_head.weight", "head/kernel", "transpose"),
]

FAMILY = Family(
    model_type="mamba",
    architecture="MambaForCausalLM",
    models="Mamba 130M–2.8B",
    config_class=Config,
    build=build,
    config_keys={
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
        "intermediate_size": int,
        "time_step_rank": object,
        # How they are trained, and how others compute.
        **dict.fromkeys(("time_step_min", "time_step_max", "time_step_floor"), float),
        **dict.fromkeys(("time_step_scale", "time_step_init_scheme"), object),
        **dict.fromkeys(("rescale_prenorm_residual", "use_mambapy"), object),
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
    weights=WEIGHTS,
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
