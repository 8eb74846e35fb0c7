"""The dtypes that models are built in."""

from collections.abc import Iterator
from contextlib import contextmanager

import keras

_DTYPES = ("float32", "bfloat16", "float16", "mixed_bfloat16", "mixed_float16")


@contextmanager
def dtype_policy(dtype: str) -> Iterator[None]:
    """Builds layers in a dtype; the configs of parts need not carry it.

    Raises:
        ValueError: If models are not built in it.
    """
    if dtype not in _DTYPES and not isinstance(dtype, keras.DTypePolicy):
        raise ValueError(f"Expected dtype to be one of {', '.join(_DTYPES)}, received {dtype!r}.")
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(dtype)
    try:
        yield
    finally:
        keras.config.set_dtype_policy(before)
