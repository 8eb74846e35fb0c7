"""KerasHub's column of RWKV-7."""

from typing import Any

from functional_llm.backbones.keras_hub.column import (
    OURS,
    REQUIRED,
    KerasHub,
    dense,
    layer_norm,
    one,
)
from functional_llm.backbones.transforms import Row, Rows, Transform
from functional_llm.graph.types import JSON

# Argument -> our field.
_RENAMED = {
    "hidden_size": "hidden_dim",
    "head_size": "head_dim",
    "gate_lora": "gate_dim",
    "mv_lora": "value_mix_dim",
    "aaa_lora": "rate_dim",
    "decay_lora": "decay_dim",
}
_EPSILON = 1e-5
_BLOCK = "layers/rwkv7__block_{}"
_MIXED = ("receptance", "decay", "key", "value", "rate", "gate")
_VECTORS = ("direction", "key_rate", "bonus")


def _fields(_: JSON) -> JSON:
    return {
        "layer_norm_epsilon": _EPSILON,
        "tie_word_embeddings": False,
        "activation": "relu2",
        "max_sequence_length": 2048,
    }


def _wrong(config: Any) -> list[str]:
    norm = "the epsilon of the norm of heads is 64e-5, whatever a head's size"
    return [norm] if config.head_dim != 64 else []


def _own_rows(index: int) -> list[Row]:
    """Returns the rows of weights that a block has itself, which it numbers as it makes them."""
    time = f"decoder_{index}/time_mix"
    paths = [f"{time}/{x}_mix/part" for x in _MIXED]
    # The first block lends its values: it mixes no others in.
    for name in ("decay", "rate", *(["value"] if index else [])):
        paths += [f"{time}/{name}_{x}" for x in ("up/bias", "down/kernel", "up/kernel")]
    paths += [f"{time}/gate_down/kernel", f"{time}/gate_up/kernel"]
    paths += [f"{time}/{x}/scale" for x in _VECTORS]
    place = _BLOCK.format(index)
    return [(f"{place}/att/vars/{i}", path, "same") for i, path in enumerate(paths)]


def _weights(config: Any) -> Rows:
    names = {"receptance": "receptance", "key": "key", "value": "value", "output_layer": "output"}
    of_heads = Transform(lambda x: x.reshape(-1, config.head_dim), lambda x: x.reshape(-1))
    return [
        one("layers/embedding", "token_embedding/embeddings"),
        *layer_norm(f"{_BLOCK.format(0)}/ln0", "embedding_norm"),
        *layer_norm(f"{_BLOCK}/ln1", f"{OURS}/time_mix_norm"),
        *layer_norm(f"{_BLOCK}/ln2", f"{OURS}/channel_mix_norm"),
        *(row for i in range(config.num_layers) for row in _own_rows(i)),
        *(
            row
            for name, part in names.items()
            for row in dense(f"{_BLOCK}/att/{name}", f"{OURS}/time_mix/{part}")
        ),
        (f"{_BLOCK}/att/ln_x/vars/0", f"{OURS}/time_mix/heads_norm/scale", of_heads),
        (f"{_BLOCK}/att/ln_x/vars/1", f"{OURS}/time_mix/heads_bias/bias", of_heads),
        one(f"{_BLOCK}/ffn", f"{OURS}/channel_mix/mix/part"),
        *dense(f"{_BLOCK}/ffn/key", f"{OURS}/channel_mix/up"),
        *dense(f"{_BLOCK}/ffn/value", f"{OURS}/channel_mix/down"),
        *layer_norm("layers/layer_normalization", "final_norm"),
        *dense("layers/dense", "head"),
    ]


RWKV7 = KerasHub(
    classes=("RWKV7Backbone",),
    arguments={
        **dict.fromkeys(
            ("hidden_size", "head_size", "num_layers", "vocabulary_size", "intermediate_dim"),
            REQUIRED,
        ),
        "gate_lora": 128,
        "mv_lora": 32,
        "aaa_lora": 64,
        "decay_lora": 64,
        "dropout_rate": 0,
    },
    renamed=_RENAMED,
    fields=_fields,
    weights=_weights,
    wrong=_wrong,
    ignored=("dropout_rate",),
    types=dict.fromkeys(_RENAMED, int),
)
