"""What kernels keep of the forward pass for their gradients: as large as the queries, or smaller.

Without it the backward pass would run the forward kernel again.
"""

from typing import Any

import jax

# What policies of `jax.checkpoint` call a kernel's result, and the logarithms of its sums.
ATTENDED = "attended"
_CUDNN_FORWARD = "dot_product_attention_fwd_wrapper"  # which JAX gives no name

_is_named = jax.checkpoint_policies.save_only_these_names(ATTENDED)


def keeps_attended(primitive: Any, *inputs: Any, **params: Any) -> bool:
    """Whether a result is what a kernel needs for its gradients: a policy of `jax.checkpoint`.

    The explicit form has no such result: its gradients need all scores, which nobody keeps.
    """
    is_cudnn: bool = primitive.name == _CUDNN_FORWARD
    return is_cudnn or bool(_is_named(primitive, *inputs, **params))
