"""What llama.cpp's files of models with gated delta nets hold otherwise than checkpoints do.

In files of Qwen 3.5, the value heads of all key heads lie by turns: the first of each, then the
second of each. Here and in checkpoints, those of one key head follow each other.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from functional_llm.backbones.delta_nets import NET, TARGET, DeltaConfig, gated_query_rows
from functional_llm.backbones.family import ROPE_BUFFERS
from functional_llm.backbones.transforms import TRANSFORMS, Rows, Transform, fused
from functional_llm.graph.types import JSON

KEYS = {
    "ssm.conv_kernel": "linear_conv_kernel_dim",
    "ssm.group_count": "linear_num_key_heads",
    "ssm.time_step_rank": "linear_num_value_heads",
    "ssm.state_size": "linear_key_head_dim",
    "ssm.value_size": "linear_value_head_dim",  # which `given` works out
    "full_attention_interval": "full_attention_interval",
}
IGNORED = ("rope.dimension_sections",)
# The norms that have one added.
OFFSET = ("*layernorm.weight", "*.q_norm.weight", "*.k_norm.weight", "model.norm.weight")


def given(keys: JSON) -> JSON:
    """Returns the keys of a file with the size of a value head, and the layers that are nets."""
    keys = dict(keys)
    if (inner := keys.pop("ssm.inner_size", None)) is not None:
        keys["ssm.value_size"] = inner // keys["ssm.time_step_rank"]
    if (nets := keys.pop("attention.recurrent_layers", None)) is not None:
        # Behind the model's own layers are those that predict further tokens.
        count = keys["block_count"] - keys.get("nextn_predict_layers", 0)
        keys["attention.sliding_window_pattern"] = nets[:count]  # whether of the other type
    return keys


def ignored(config: DeltaConfig) -> list[str]:
    """Returns the patterns of tensors of layers that predict further tokens, here and there."""
    return [*ROPE_BUFFERS, "mtp.*", f"blk.{config.num_layers}.*"]


def rows(config: DeltaConfig) -> Rows:
    """Returns the rows of a file whose value heads lie as in checkpoints."""
    return [
        *gated_query_rows(config),
        (f"{NET}.conv1d.weight", f"{TARGET}/convolution/kernel", "transpose"),
        (f"{NET}.A_log", f"{TARGET}/log_decay/log_rate", "log_of_negative"),
        (f"{NET}.dt_proj.bias", f"{TARGET}/log_decay/shift", "same"),
    ]


def rows_by_turns(config: DeltaConfig) -> Rows:
    """Returns the rows of a file in which the value heads of all key heads lie by turns."""
    theirs = (config.delta_net.group, config.num_delta_key_heads)
    ours = theirs[::-1]

    def turned(name: str, axis: int) -> Transform:
        other = TRANSFORMS[name]
        return Transform(
            lambda x: other.forward(_swapped(x, axis, theirs)),
            lambda x: _swapped(other.inverse(x), axis, ours),
            computes=other.computes,
        )

    keys = sum(config.delta_net.widths[:2])
    convolution = Transform(
        lambda x: np.concatenate([x[:keys], _swapped(x[keys:], 0, theirs)]).T,
        lambda x: np.concatenate([x.T[:keys], _swapped(x.T[keys:], 0, ours)]),
    )
    kernel, _ = fused()
    joined = _LastByTurns(kernel.forward, kernel.inverse, axis=-2, heads=theirs)
    single = (("in_proj_z", "gate"), ("in_proj_b", "rate"), ("in_proj_a", "decay"))
    joined_parts = ("query", "key", "value")
    return [
        *gated_query_rows(config),
        *((f"{NET}.in_proj_qkv.weight", f"{TARGET}/{x}/kernel", joined) for x in joined_parts),
        *(
            (f"{NET}.{source}.weight", f"{TARGET}/{x}/kernel", turned("transpose", -2))
            for source, x in single
        ),
        (f"{NET}.conv1d.weight", f"{TARGET}/convolution/kernel", convolution),
        (f"{NET}.A_log", f"{TARGET}/log_decay/log_rate", turned("log_of_negative", 0)),
        (f"{NET}.dt_proj.bias", f"{TARGET}/log_decay/shift", turned("same", 0)),
        (f"{NET}.out_proj.weight", f"{TARGET}/output/kernel", turned("transpose", -1)),
    ]


@dataclass(frozen=True)
class _LastByTurns(Transform):
    """A fused tensor, of whose last part the heads lie by turns.

    Args:
        heads: As for `_swapped`.
    """

    heads: tuple[int, int] = (1, 1)

    def parts(self, array: np.ndarray, sizes: Sequence[int], axis: int) -> list[np.ndarray]:
        *others, last = super().parts(array, sizes, axis)
        return [*others, _swapped(last, axis, self.heads)]

    def whole(self, parts: Iterable[np.ndarray], axis: int) -> np.ndarray:
        *others, last = parts
        return super().whole([*others, _swapped(last, axis, self.heads[::-1])], axis)


def _swapped(array: np.ndarray, axis: int, heads: tuple[int, int]) -> np.ndarray:
    """Returns an array with heads in two levels on an axis, with the inner level outside."""
    moved = np.moveaxis(array, axis, 0)
    turned = moved.reshape(*heads, -1, *moved.shape[1:]).swapaxes(0, 1)
    return np.moveaxis(turned.reshape(moved.shape), 0, axis)
