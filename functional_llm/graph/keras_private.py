"""All that this library uses of Keras without a public name: one function each."""

from collections.abc import Iterator
from contextlib import contextmanager

import keras
from keras.src.backend.common import global_state


@contextmanager
def uninitialized() -> Iterator[None]:
    """Inside, variables are made without values: whoever makes them must assign every one.

    Spares a load the random initialisation, and the memory for it.
    """
    with keras.StatelessScope(initialize_variables=False):
        yield
    # Keras (private) remembers such variables, to initialise them when a later scope ends.
    global_state.set_global_attribute("uninitialized_variables", [])
