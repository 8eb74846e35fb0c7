"""What runs on JAX only."""

import keras


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
