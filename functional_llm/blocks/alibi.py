"""ALiBi as one more channel of queries and keys, for models that round it.

Shapes: B batch, T tokens, N heads, H head size.
"""

import ml_dtypes
import numpy as np
from keras import ops

from functional_llm.blocks.attention import Inputs, PartFunction, alibi_slopes
from functional_llm.graph.types import Tensor


def alibi_query() -> PartFunction:
    """Part from (B, T, N, H) to (B, T, N, H + 1): a one, which `alibi_key` is multiplied with."""
    return lambda x, inputs: ops.concatenate([x, ops.ones_like(x[..., :1])], axis=-1)


def alibi_key(num_heads: int) -> PartFunction:
    """Part from (B, T, N, H) to (B, T, N, H + 1): slope * position, rounded as Falcon was trained.

    It joins the product of query and key before that is scaled. Without the query's position,
    which is the same for all slots, the softmax is the same.

    Args:
        num_heads: N.
    """
    slopes_N1 = np.array(alibi_slopes(num_heads))[:, None]
    slopes_N1 = slopes_N1.astype(ml_dtypes.bfloat16).astype("float32")

    def add_channel(x: Tensor, inputs: Inputs) -> Tensor:
        positions_BT11 = ops.cast(ops.expand_dims(inputs["positions"], (2, 3)), "float32")
        channel = _rounded(_rounded(positions_BT11) * slopes_N1)
        return ops.concatenate([x, ops.cast(channel, x.dtype)], axis=-1)

    return add_channel


def _rounded(x: Tensor) -> Tensor:
    """Returns float32 numbers rounded to the digits of bfloat16 (Veltkamp's splitting).

    XLA leaves out casts to bfloat16 and back.
    """
    scaled = x * 65537.0  # 2**16 + 1: float32 has 16 digits more
    return scaled - (scaled - x)
