"""Attention by cuDNN, on NVIDIA GPUs, through `jax.nn.dot_product_attention`.

Conditions: `jax/_src/cudnn/fused_attention_stablehlo.py` of JAX 0.10.2, `check_layout` and
`check_is_flash_attention`.

Shapes: B batch, T query tokens, S key slots, N query heads, K key/value heads, H head size.
"""

from typing import Literal, TypeAlias

import jax

from functional_llm.kernels.explicit import Scoring
from functional_llm.kernels.mask import Mask

Implementation: TypeAlias = Literal["cudnn", "xla"]


def attend_causally(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    mask: Mask,
    scoring: Scoring,
    sinks_N: None = None,
    slopes_N: None = None,
    *,
    implementation: Implementation = "cudnn",
) -> jax.Array:
    """Attends to tokens in order: the kernel knows by index who sees whom.

    Padding is behind the tokens of its row, where no token sees it.
    """
    # JAX counts a window without the query itself. Without `is_causal`, it would show the future.
    window = None if mask.window is None else (mask.window - 1, 0)
    return jax.nn.dot_product_attention(
        q_BTNH,
        k_BSKH,
        v_BSKH,
        scale=scoring.scale,
        is_causal=True,
        local_window_size=window,
        implementation=implementation,
    )


def attend_masked(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    mask: Mask,
    scoring: Scoring,
    sinks_N: None = None,
    slopes_N: None = None,
    *,
    implementation: Implementation = "cudnn",
) -> jax.Array:
    """Attends with any mask, of which the kernel reads B * T * S numbers, one for all heads."""
    return jax.nn.dot_product_attention(
        q_BTNH,
        k_BSKH,
        v_BSKH,
        mask=mask.visible()[:, None],
        scale=scoring.scale,
        implementation=implementation,
    )
