"""The tensors of a Kimi Linear, in checkpoints and in GGUF files."""

from functional_llm.backbones import latent, llama
from functional_llm.backbones.experts import expert_rows, shared_rows
from functional_llm.backbones.family import all_dense_rows, gguf_expert_rows
from functional_llm.backbones.kimi_linear_keys import KimiConfig
from functional_llm.backbones.routed_experts import CORRECTION
from functional_llm.backbones.transforms import Rows, split_axis

_LAYER = "model.layers.{}"
_NET, _TARGET = f"{_LAYER}.self_attn", "decoder_{}/delta_net"
_GATE, _MLP = f"{_NET}.forget_gate", f"{_LAYER}.mlp"
_DENSE = {
    **{f"{x[0]}_proj": x for x in ("query", "key", "value", "output")},
    "b_proj": "rate",
    "g_a_proj": "gate_latent",
    "g_b_proj": "gate",
    "forget_gate.f_a_proj": "decay_latent",
    "forget_gate.f_b_proj": "decay",
}
_CONVOLUTIONS = (("q", "query"), ("k", "key"), ("v", "value"))
_OF_GATE = ("f_a_proj.", "f_b_proj.", "A_log", "dt_bias")


def weights(config: KimiConfig) -> Rows:
    """Returns the rows of all tensors, as Transformers' modules have them."""
    sizes = (1, 1, config.num_delta_heads, 1)
    return [
        *(row for row in llama.WEIGHTS if "/attention/" not in row[1]),
        (f"{_LAYER}.input_layernorm.weight", f"{_TARGET}_norm/scale", "same"),
        *latent.attention_rows(config),
        *all_dense_rows(_NET, _TARGET, _DENSE),
        *(
            (f"{_NET}.{x}_conv1d.weight", f"{_TARGET}/{ours}_convolution/kernel", "depthwise")
            for x, ours in _CONVOLUTIONS
        ),
        (f"{_GATE}.A_log", f"{_TARGET}/log_decay/log_rate", split_axis(0, sizes)),
        (f"{_GATE}.dt_bias", f"{_TARGET}/log_decay/shift", "same"),
        (f"{_NET}.o_norm.weight", f"{_TARGET}/norm/scale", "same"),
        *expert_rows(_MLP, ("w1", "w3", "w2")),
        *shared_rows(f"{_MLP}.shared_experts"),
        (f"{_MLP}.gate.e_score_correction_bias", CORRECTION, "same"),
    ]


# Names in checkpoints -> those of Transformers' modules. Transformers writes the one MLP of a layer
# among the experts, too, and reads it there; the line behind leaves it alone on the way out.
STORED_PARTS = {
    ".block_sparse_moe.": ".mlp.",
    ".mlp.": ".mlp.",
    **{f".block_sparse_moe.{x}": f".mlp.{x}" for x in ("gate.", "experts.", "shared_experts.")},
    **{f".self_attn.{x}": f".self_attn.forget_gate.{x}" for x in _OF_GATE},
}


def gguf_rows(config: KimiConfig) -> Rows:
    """Returns the rows of what GGUF files hold in other tensors, or as other numbers."""
    return [
        *latent.gguf_rows(config),
        *gguf_expert_rows(),
        ("blk.{}.exp_probs_b.bias", CORRECTION, "same"),
        ("blk.{}.ssm_f_a.weight", f"{_TARGET}/decay_latent/kernel", "transpose"),
        ("blk.{}.ssm_f_b.weight", f"{_TARGET}/decay/kernel", "transpose"),
        ("blk.{}.ssm_a", f"{_TARGET}/log_decay/log_rate", "log_of_negatives"),
        ("blk.{}.ssm_dt.bias", f"{_TARGET}/log_decay/shift", "same"),
    ]
