"""Where an RWKV-7's weights lie: in checkpoints of flash-linear-attention, and in GGUF files."""

from typing import Any

from functional_llm.backbones.family import dense_rows, layer_norm_rows
from functional_llm.backbones.transforms import Rows, Transform

_LAYER, _TIME = "model.layers.{}", "decoder_{}/time_mix"
_PARTS = {"r": "receptance", "w": "decay", "k": "key", "v": "value", "a": "rate", "g": "gate"}


def _of_heads(size: int) -> Transform:
    """Returns the transform of vectors of all heads, of which the variable is (heads, size)."""
    return Transform(lambda x: x.reshape(-1, size), lambda x: x.reshape(-1))


def weights(config: Any) -> Rows:
    """Returns the weight table."""
    row = Transform(lambda x: x.reshape(-1), lambda x: x.reshape(1, 1, -1))
    of_heads = _of_heads(config.head_dim)
    attn, ffn = f"{_LAYER}.attn", f"{_LAYER}.ffn"
    ranks = {x: _PARTS[x] for x in "wavg"}
    projections = {x: _PARTS[x] for x in "rkv"} | {"o": "output"}
    return [
        ("model.embeddings.weight", "token_embedding/embeddings", "same"),
        *layer_norm_rows("model.layers.0.pre_norm", "embedding_norm"),
        *layer_norm_rows(f"{_LAYER}.attn_norm", "decoder_{}/time_mix_norm"),
        *layer_norm_rows(f"{_LAYER}.ffn_norm", "decoder_{}/channel_mix_norm"),
        *((f"{attn}.x_{x}", f"{_TIME}/{name}_mix/part", row) for x, name in _PARTS.items()),
        (f"{attn}.k_k", f"{_TIME}/direction/scale", "same"),
        (f"{attn}.k_a", f"{_TIME}/key_rate/scale", "same"),
        (f"{attn}.r_k", f"{_TIME}/bonus/scale", "same"),
        (f"{attn}.g_norm.weight", f"{_TIME}/heads_norm/scale", of_heads),
        (f"{attn}.g_norm.bias", f"{_TIME}/heads_bias/bias", of_heads),
        *(
            entry
            for x, name in projections.items()
            for entry in dense_rows(f"{attn}.{x}_proj", f"{_TIME}/{name}")
        ),
        *(
            entry
            for x, name in ranks.items()
            for place, part in (("0", "down"), ("2", "up"))
            for entry in dense_rows(f"{attn}.{x}_lora.lora.{place}", f"{_TIME}/{name}_{part}")
        ),
        (f"{ffn}.x_k", "decoder_{}/channel_mix/mix/part", "same"),
        *dense_rows(f"{ffn}.key", "decoder_{}/channel_mix/up"),
        *dense_rows(f"{ffn}.value", "decoder_{}/channel_mix/down"),
        *layer_norm_rows("model.norm", "final_norm"),
        ("lm_head.weight", "head/kernel", "transpose"),
    ]


def gguf_rows(config: Any) -> Rows:
    """Returns the rows of llama.cpp's files, which have names of RWKV's own."""
    of_heads = _of_heads(config.head_dim)
    part = Transform(lambda x: x.reshape(-1), lambda x: x.reshape(1, 1, 1, -1), axis=0)
    time, channel = "blk.{}.time_mix", "blk.{}.channel_mix"
    low_rank = [(x, _PARTS[x]) for x in "wav"]
    projections = ("receptance", "key", "value", "output")
    return [
        ("token_embd.weight", "token_embedding/embeddings", "same"),
        *layer_norm_rows("token_embd_norm", "embedding_norm"),
        *layer_norm_rows("blk.{}.attn_norm", "decoder_{}/time_mix_norm"),
        *layer_norm_rows("blk.{}.attn_norm_2", "decoder_{}/channel_mix_norm"),
        *((f"{time}_lerp_fused.weight", f"{_TIME}/{x}_mix/part", part) for x in _PARTS.values()),
        *(dense_rows(f"{time}_{x}", f"{_TIME}/{x}")[0] for x in projections),
        *((f"{time}_{x}0.weight", f"{_TIME}/{name}_up/bias", "same") for x, name in low_rank),
        *(
            (f"{time}_{x}{number}.weight", f"{_TIME}/{name}_{place}/kernel", "transpose")
            for x, name in [*low_rank, ("g", "gate")]
            for number, place in ((1, "down"), (2, "up"))
        ),
        (f"{time}_k_k.weight", f"{_TIME}/direction/scale", "same"),
        (f"{time}_k_a.weight", f"{_TIME}/key_rate/scale", "same"),
        (f"{time}_r_k.weight", f"{_TIME}/bonus/scale", of_heads),
        (f"{time}_ln.weight", f"{_TIME}/heads_norm/scale", of_heads),
        (f"{time}_ln.bias", f"{_TIME}/heads_bias/bias", of_heads),
        (f"{channel}_lerp_k.weight", "decoder_{}/channel_mix/mix/part", "same"),
        (f"{channel}_key.weight", "decoder_{}/channel_mix/up/kernel", "transpose"),
        (f"{channel}_value.weight", "decoder_{}/channel_mix/down/kernel", "transpose"),
        *layer_norm_rows("output_norm", "final_norm"),
        ("output.weight", "head/kernel", "transpose"),
    ]


GGUF_KEYS = {
    "attention.layer_norm_epsilon": "norm_eps",
    "wkv.head_size": "head_dim",
    "attention.decay_lora_rank": "decay_low_rank_dim",
    "attention.iclr_lora_rank": "a_low_rank_dim",
    "attention.value_residual_mix_lora_rank": "v_low_rank_dim",
    "attention.gate_lora_rank": "gate_low_rank_dim",
}
