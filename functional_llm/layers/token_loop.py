"""A loop from token to token, for states that no sum over pairs of tokens gives.

Shapes: B batch, T tokens.
"""

from collections.abc import Callable, Mapping
from typing import TypeAlias

import keras
from keras import ops

from functional_llm.graph.types import Tensor

Step: TypeAlias = Callable[[Tensor, Mapping[str, Tensor]], tuple[Tensor, Tensor]]

# Tokens. The backward pass computes states again, from one that was kept for each chunk.
CHUNK = 32


def begins_text(segments_BT: Tensor) -> Tensor:
    """Returns whether each token is the first of its segment in this call, (B, T)."""
    return ops.concatenate(
        [
            ops.ones_like(segments_BT[:, :1], dtype="bool"),
            segments_BT[:, 1:] != segments_BT[:, :-1],
        ],
        axis=1,
    )


def through_tokens(
    step: Step, state: Tensor, tokens: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """Goes through tokens, one after another; of long texts, one state a chunk is kept.

    Args:
        step: From a state and a token to the state after it, and what the token reads.
        state: Before the first token.
        tokens: Name -> (B, T, ...); among them `keeps`, a factor of the state, 0 where a text
            begins. A token that is all zeros but for its `keeps` may not change the state.

    Returns:
        The state after all tokens; what they read, (B, T, ...).
    """
    tokens = {name: ops.swapaxes(x, 0, 1) for name, x in tokens.items()}
    length = tokens["keeps"].shape[0]
    if length == 1:
        state, y = step(state, {name: x[0] for name, x in tokens.items()})
        return state, ops.expand_dims(y, 1)
    if length <= CHUNK:
        state, y = ops.scan(step, state, tokens)
    else:
        state, y = _by_chunks(step, state, tokens, length)
    return state, ops.swapaxes(y, 0, 1)


def _by_chunks(
    step: Step, state: Tensor, tokens: Mapping[str, Tensor], length: int
) -> tuple[Tensor, Tensor]:
    """Returns the state after all tokens, and what each reads; keeps one state a chunk."""
    chunks = -(-length // CHUNK)
    further = chunks * CHUNK - length

    def cut(name: str, x: Tensor) -> Tensor:
        widths = [(0, further), *((0, 0) for _ in x.shape[1:])]
        x = ops.pad(x, widths, constant_values=1.0 if name == "keeps" else 0.0)
        return ops.reshape(x, (chunks, CHUNK, *ops.shape(x)[1:]))

    def chunk(state: Tensor, inner: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        return ops.scan(step, state, inner)

    through = keras.remat(chunk)
    state, y = ops.scan(through, state, {name: cut(name, x) for name, x in tokens.items()})
    y = ops.reshape(y, (chunks * CHUNK, *ops.shape(y)[2:]))
    return state, y[:length]
