"""A SavedModel from strings to strings: tokenizer, stock model and greedy loop in one graph.

Run as a program, in a process whose Keras uses TensorFlow (see `exporting`). Imports TensorFlow.

Shapes: B prompts, T tokens, S slots of the cache, C new tokens, V vocabulary.
"""

import json
import pickle
import sys
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf
from keras import tree

from functional_llm.stock.exporting import MODEL, OPTIONS, REFUSED, TOKENIZER
from functional_llm.tokenizers import TextTokenizer


class TextModel(tf.Module):
    """Goes on with prompts, each token the most probable one.

    Args:
        decoder: The layer "decoder" of a stock model.
        tokenizer: The model's tokenizer.
        max_new_tokens: Most tokens to write.
        context: Most tokens of a prompt and its text together; `None` if there is no limit.
    """

    def __init__(
        self,
        decoder: keras.Model,
        tokenizer: TextTokenizer,
        max_new_tokens: int,
        context: int | None,
    ) -> None:
        super().__init__()
        self._tokenizer = tokenizer.as_tf(add_bos=tokenizer.add_bos, parse_special=True)
        self._weights = [variable.value for variable in decoder.variables]
        self._cache, self._states = (
            [(x.shape[2:], x.dtype) for x in tree.flatten(decoder.input.get(name, {}))]
            for name in ("cache", "state")
        )
        self._stop_ids = tf.constant(sorted(tokenizer.stop_token_ids), tf.int32)
        self._count = max_new_tokens
        self._context = context
        # As a function: a SavedModel would keep a layer's other functions, too.
        self._decode = lambda *inputs: _call(decoder, *inputs)

    @tf.function(
        autograph=False, input_signature=[tf.TensorSpec([None], tf.string, name="prompts")]
    )
    def generate(self, prompts: Any) -> dict[str, Any]:
        """Returns the new text of each prompt."""
        rows = self._tokenizer.tokenize(prompts)
        lengths_B = tf.cast(rows.row_lengths(), "int32")
        with tf.control_dependencies(self._checks(prompts, lengths_B)):
            tokens_BT = rows.to_tensor(0)
        new_CB = self._write(tokens_BT, lengths_B)
        new_BC = tf.transpose(new_CB)
        new = tf.ragged.boolean_mask(new_BC, new_BC >= 0)
        return {"texts": self._tokenizer.detokenize(new, continues=True)}

    def _checks(self, prompts: Any, lengths_B: Any) -> list[Any]:
        message = "Expected prompts of at least one character and one token."
        checks = [tf.debugging.assert_positive(x, message) for x in _sizes(prompts, lengths_B)]
        if self._context is not None:
            most = self._context - self._count
            message = (
                f"Expected prompts of at most {most} tokens: the model's context holds "
                f"{self._context}, and {self._count} are to be written."
            )
            checks.append(tf.debugging.assert_less_equal(lengths_B, most, message))
        return checks

    def _write(self, tokens_BT: Any, lengths_B: Any) -> Any:
        """Returns the new ids (C, B), -1 behind the end of a row."""
        batch = tf.shape(tokens_BT)[0]
        nothing = [tf.zeros([batch, 0, *sizes], dtype) for sizes, dtype in self._cache]
        empty = [tf.zeros([batch, 1, *sizes], dtype) for sizes, dtype in self._states]
        begin_B = tf.zeros_like(lengths_B)
        logits_BTV, update, state = self._decode(tokens_BT, begin_B, lengths_B, nothing, empty)
        free = [[0, 0], [0, self._count]]
        cache = [tf.pad(x, free + [[0, 0]] * (len(x.shape) - 2)) for x in update]
        token_B = _choose(tf.gather(logits_BTV, lengths_B - 1, batch_dims=1))
        new_CB = tf.concat([token_B[None], tf.fill([self._count - 1, batch], -1)], 0)

        def step(i: Any, token_B: Any, done_B: Any, new_CB: Any, *kept: Any) -> tuple[Any, ...]:
            at_B, one_B = lengths_B + i, tf.ones_like(lengths_B)
            cache, state = kept[: len(self._cache)], kept[len(self._cache) :]
            inputs = (token_B[:, None], at_B, one_B, cache, state)
            logits_B1V, update, state = self._decode(*inputs)
            places_B2 = tf.stack([tf.range(batch), at_B], axis=1)
            cache = tuple(
                tf.tensor_scatter_nd_update(kept, places_B2, new[:, 0])
                for kept, new in zip(cache, update, strict=True)
            )
            token_B = _choose(logits_B1V[:, 0])
            shown_B = tf.where(done_B, -1, token_B)
            new_CB = tf.tensor_scatter_nd_update(new_CB, [[i + 1]], shown_B[None])
            return i + 1, token_B, done_B | self._is_end(token_B), new_CB, *cache, *state

        def goes_on(i: Any, token_B: Any, done_B: Any, *_: Any) -> Any:
            return (i + 1 < self._count) & ~tf.reduce_all(done_B)

        start = (tf.constant(0), token_B, self._is_end(token_B), new_CB, *cache, *state)
        shapes = [x.shape for x in start]
        shapes[3] = tf.TensorShape([self._count, None])
        return tf.while_loop(goes_on, step, start, shape_invariants=tuple(shapes))[3]

    def _is_end(self, token_B: Any) -> Any:
        return tf.reduce_any(token_B[:, None] == self._stop_ids[None], axis=1)


def _call(
    decoder: keras.Model, tokens_BT: Any, length_B: Any, new_B: Any, cache: Any, state: Any
) -> tuple[Any, Any, Any]:
    """Returns logits, what belongs into the cache, and states."""
    inputs = {"token_ids": tokens_BT, "cache_length": length_B}
    inputs["cache"] = tree.pack_sequence_as(decoder.input["cache"], list(cache))
    if state:
        inputs["state"] = tree.pack_sequence_as(decoder.input["state"], list(state))
        inputs["new_length"] = new_B
    result = decoder(inputs, training=False)
    states = tree.flatten(result.get("state", {}))
    return result["logits"], tree.flatten(result["cache_update"]), states


def _sizes(prompts: Any, lengths_B: Any) -> tuple[Any, Any]:
    return tf.strings.length(prompts), lengths_B


def _choose(logits_BV: Any) -> Any:
    finite = tf.debugging.check_numerics(logits_BV, "The model's logits are not finite.")
    return tf.argmax(finite, axis=-1, output_type=tf.int32)


def main(folder: Path, target: str) -> None:
    """Reads what `export_text_model` has written into the folder, and writes the SavedModel."""
    options = json.loads((folder / OPTIONS).read_text("utf-8"))
    tokenizer = pickle.loads((folder / TOKENIZER).read_bytes())
    stock = keras.saving.load_model(folder / MODEL, compile=False)
    try:
        model = TextModel(stock.get_layer("decoder"), tokenizer, **options)
    except ValueError as error:
        (folder / REFUSED).write_text(str(error), "utf-8")
        return
    tf.saved_model.save(model, target, signatures={"serving_default": model.generate})


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
