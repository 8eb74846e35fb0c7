"""What to say when a model's logits are not finite."""

import keras
import numpy as np
from keras import ops

from functional_llm.graph.selection import walk

_SHOWN = 3  # names of weights in a message


def not_finite_error(model: keras.Model) -> RuntimeError:
    """Returns the error for logits that are NaN or infinite: why they may be, and what to do.

    Args:
        model: The model that computed them. Its weights are looked through: this takes a while.
    """
    broken = [v for v in model.variables if not _is_finite(v)]
    dtypes = {str(v.dtype) for v in broken} or {x.compute_dtype for _, x in walk(model)}
    parts = ["Expected finite logits. Received: NaN or infinity"]
    if broken:
        names = ", ".join(v.path for v in broken[:_SHOWN])
        parts.append(f", and so hold {len(broken)} of the weights ({names})")
    if "float16" in dtypes:
        parts.append(
            " in float16, whose numbers end at 65504. Load the model in bfloat16 or float32, whose "
            'numbers do not: `Backbone.from_preset(handle, dtype="bfloat16")`.'
        )
    else:
        name = "bfloat16" if "bfloat16" in dtypes else "float32"
        parts.append(
            f" in {name}. No other dtype would do, for bfloat16 and float32 have the largest "
            "numbers: the weights are wrong. Load them again; if they were trained, train with a "
            "lower learning rate."
        )
    return RuntimeError("".join(parts))


def _is_finite(variable: keras.Variable) -> bool:
    if not keras.backend.is_float_dtype(variable.dtype):
        return True
    # A reduction on the device: copies of all weights in float32 need not fit.
    return bool(np.asarray(ops.all(ops.isfinite(variable))))
