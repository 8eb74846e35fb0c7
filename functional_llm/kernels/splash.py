"""Attention by JAX's splash kernel, on TPUs. It has run in Pallas's interpreter, on no TPU.

Shapes: B batch, T tokens, N query heads, K key/value heads, H head size of queries and keys, V that
of values.
"""

import jax
import jax.numpy as jnp

from functional_llm.kernels.explicit import Scoring
from functional_llm.kernels.kept import ATTENDED
from functional_llm.kernels.mask import Mask

MULTIPLE = 128  # the kernel cuts T in blocks of so many, or of a multiple
_LARGEST_BLOCK = 512


def attend_by_splash(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKV: jax.Array,
    mask: Mask,
    scoring: Scoring,
    sinks_N: jax.Array | None = None,
    slopes_N: None = None,
    *,
    interpret: bool = False,
) -> jax.Array:
    """Attends to tokens in order: the kernel knows by index who sees whom.

    Args:
        q_BTNH: Queries.
        k_BTKH: Keys.
        v_BTKV: Values.
        mask: One that is in order, with a window or without.
        scoring: How scores are made.
        sinks_N: As for `attend_explicitly`.
        slopes_N: Not for this kernel.
        interpret: Run in Pallas's interpreter, on any device.
    """
    # Importing Pallas takes a while, and needs what some installations of JAX do not have.
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel as kernel,
    )
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    length, heads = q_BTNH.shape[1:3]
    shape = (length, length)
    seen = (None if mask.window is None else mask.window - 1, 0)
    block = next(n for n in (_LARGEST_BLOCK, 256, MULTIPLE) if length % n == 0)
    attend = kernel.make_splash_mha(
        masks.MultiHeadMask([masks.LocalMask(shape, seen, 0)] * heads),
        block_sizes=kernel.BlockSizes(
            block_q=block,
            block_kv=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            block_q_dq=block,
            block_kv_dq=block,
        ),
        attn_logits_soft_cap=scoring.soft_cap,
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name=ATTENDED,
        interpret=interpret,
    )
    # The kernel has no scale.
    q_BNTH = (q_BTNH * jnp.asarray(scoring.scale, q_BTNH.dtype)).swapaxes(1, 2)
    k_BKTH, v_BKTV = (x.swapaxes(1, 2) for x in (k_BTKH, v_BTKV))
    sinks_N = None if sinks_N is None else sinks_N.astype("float32")
    out_BNTV = jax.vmap(lambda q, k, v: attend(q, k, v, sinks=sinks_N))(q_BNTH, k_BKTH, v_BKTV)
    return out_BNTV.swapaxes(1, 2)
