"""What configs of several kinds start from."""

from typing import Any

LLAMA = {
    "model_type": "llama",
    "vocab_size": 128,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,  # the defaults of many families lie outside of so small a vocabulary
}
GRANITE = {
    **LLAMA,
    "model_type": "granite",
    "embedding_multiplier": 3.0,
    "attention_multiplier": 0.4,
    "residual_multiplier": 0.6,
    "logits_scaling": 1.7,
}
GPT2 = {
    "model_type": "gpt2",
    "vocab_size": 128,
    "n_embd": 48,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 512,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}
STRETCHED = {"factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 10000.0}


def llama(**changes: Any) -> dict[str, Any]:
    return {**LLAMA, **changes}
