"""What runs on JAX only."""

import keras

from functional_llm.graph.types import Tensor


def require_jax(what: str) -> None:
    """Refuses to go on with another backend than JAX.

    Args:
        what: What needs it, for the message.

    Raises:
        RuntimeError: If Keras runs on another one.
    """
    backend = keras.backend.backend()
    if backend != "jax":
        raise RuntimeError(
            f"{what} needs JAX: set KERAS_BACKEND=jax before Keras is imported (it is {backend})."
        )


def stored(x: Tensor) -> Tensor:
    """Returns a tensor as it is, which is in memory as a whole for all that reads it.

    XLA may rather keep what the tensor is the sum of, for a gradient that reads it much later.
    """
    if keras.backend.backend() != "jax":
        return x
    import jax

    return jax.lax.optimization_barrier(x)
