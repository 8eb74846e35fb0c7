"""A tokenizer as TensorFlow operations. Imports TensorFlow.

Shapes: B texts, P pieces.
"""

from collections.abc import Mapping
from functools import cache
from typing import Any

import tensorflow as tf
import tokenizers

from functional_llm.tokenizers.engines import Engine, TokenizersEngine
from functional_llm.tokenizers.in_graph.added import make_splitting
from functional_llm.tokenizers.in_graph.patterns import all_characters
from functional_llm.tokenizers.in_graph.ragged import Pieces, Splitter, as_pieces
from functional_llm.tokenizers.in_graph.refusal import refuse
from functional_llm.tokenizers.in_graph.steps import Change, Compose, read_steps
from functional_llm.tokenizers.in_graph.words import BytePairEncoder, Cutter, change
from functional_llm.tokenizers.sentencepiece_engine import SentencePieceEngine


class InGraphTokenizer(tf.Module):
    """A tokenizer of TensorFlow operations only, for `tf.data` and SavedModels.

    Args:
        engine: The engine of the tokenizer.
        bos_token_id: The id to put first, unless a text begins with it; `None` for none.
        parse_special: Whether the names of special tokens in a text are these tokens.

    Raises:
        ValueError: If the result could be another than the engine's.
    """

    def __init__(self, engine: Engine, bos_token_id: int | None, parse_special: bool) -> None:
        super().__init__(name="tokenizer")
        self._bos_token_id = bos_token_id
        match engine:
            case TokenizersEngine():
                self._encoder: Any = _BytePairs(engine, parse_special)
            case SentencePieceEngine():
                self._encoder = _SentencePiece(engine, parse_special)
            case _:
                raise refuse(f"an engine of its own, {type(engine).__name__}")
        self._special = engine.special_ids
        self._adds_space = engine.adds_space
        self._bytes = tf.constant([engine.token_bytes(i) for i in range(engine.vocabulary_size)])
        special = [i in engine.special_ids for i in range(engine.vocabulary_size)]
        self._shown = tf.where(tf.constant(special), "", self._bytes)

    def tokenize(self, texts: Any) -> Any:
        """Encodes texts.

        Args:
            texts: A string, or a vector of strings (B,), in UTF-8.

        Returns:
            The ids, int32: of a string a vector, of a vector a ragged tensor (B, None).
        """
        texts = tf.convert_to_tensor(texts, tf.string)
        if texts.shape.rank not in (0, 1):
            raise ValueError(
                f"Expected a string or a vector of strings, received the shape {texts.shape}. Use "
                "`tf.reshape`, or `with_flat_values` for a ragged tensor."
            )
        ids = self.tokenize_batch(tf.reshape(texts, [-1]))
        return ids if texts.shape.rank == 1 else ids[0]

    def detokenize(
        self, ids: Any, skip_special_tokens: bool = True, continues: bool = False
    ) -> Any:
        """Decodes ids. Bytes that are no valid UTF-8 become U+FFFD.

        Args:
            ids: Integers: a vector, or rows, ragged or not.
            skip_special_tokens: Whether to leave out BOS, EOS and the like.
            continues: Whether the ids continue an earlier text. If not, the space that
                sentencepiece puts before a text is taken off.

        Returns:
            A string, or a vector of strings.
        """
        if not isinstance(ids, tf.RaggedTensor):
            ids = tf.convert_to_tensor(ids)
        flat = tf.cast(ids.flat_values if isinstance(ids, tf.RaggedTensor) else ids, "int32")
        with tf.control_dependencies([tf.debugging.assert_non_negative(flat)]):
            table = tf.concat([self._shown if skip_special_tokens else self._bytes, [""]], 0)
            parts = tf.gather(table, tf.minimum(flat, tf.size(table) - 1))
        if isinstance(ids, tf.RaggedTensor):
            parts = ids.with_flat_values(parts)
        data = tf.strings.reduce_join(parts, axis=-1)
        if self._adds_space and not continues:
            start = tf.cast(tf.strings.substr(data, 0, 1) == " ", "int32")
            data = tf.strings.substr(data, start, tf.strings.length(data) - start)
        return tf.strings.unicode_transcode(data, "UTF-8", "UTF-8", errors="replace")

    @tf.function(autograph=False, input_signature=[tf.TensorSpec([None], tf.string)])
    def tokenize_batch(self, texts_B: Any) -> Any:
        """As `tokenize`, of a vector: what a SavedModel of this module has."""
        pieces = as_pieces(texts_B)
        pieces, words = self._encoder.encode(pieces)
        # Tokens and the ids of words, in the order of the pieces.
        added = tf.cast(tf.where(pieces.ids >= 0)[:, 0], "int32")
        ids = tf.concat([words.flat_values, tf.gather(pieces.ids, added)], 0)
        places = tf.concat([tf.cast(words.value_rowids(), "int32"), added], 0)
        order = tf.argsort(places, stable=True)
        rows = tf.gather(pieces.rows, tf.gather(places, order))
        count = tf.size(texts_B)
        ids = tf.RaggedTensor.from_value_rowids(
            tf.gather(ids, order), rows, nrows=count, validate=False
        )
        return ids if self._bos_token_id is None else self._with_bos(ids, count)

    def _with_bos(self, ids: Any, count: Any) -> Any:
        bos = tf.fill([count, 1], self._bos_token_id)
        first = ids[:, :1].to_tensor(-1, shape=[None, 1])
        added = tf.RaggedTensor.from_tensor(bos).with_row_splits_dtype(ids.row_splits.dtype)
        added = tf.ragged.boolean_mask(added, first != bos)
        return tf.concat([added, ids], axis=1)


class _BytePairs(tf.Module):
    def __init__(self, engine: TokenizersEngine, parse_special: bool) -> None:
        super().__init__()
        tokenizer = engine.tokenizer
        steps = read_steps(tokenizer)
        added = tokenizer.get_added_tokens_decoder().items()
        normalizer = tokenizer.normalizer
        as_is = [(x.content, x, i) for i, x in added if not x.normalized]
        changed = [
            (normalizer.normalize_str(x.content) if normalizer else x.content, x, i)
            for i, x in added
            if x.normalized
        ]
        self._as_is = Splitter(make_splitting(as_is, parse_special))
        self._changed = Splitter(make_splitting(changed, parse_special))
        self._normalizer = [_with_tables(step) for step in steps.normalizer]
        self._splitting = steps.splitting
        self._cutters = list(map(Cutter, steps.cuts))
        self._byte_pairs = BytePairEncoder(steps.byte_pairs)

    def encode(self, pieces: Pieces) -> tuple[Pieces, Any]:
        """Returns the pieces, and a row of ids for each; an empty one for an added token."""
        pieces = self._as_is.split(pieces)
        for step in self._normalizer:
            pieces = change(pieces, step)
        pieces = self._changed.split(pieces)
        for step in self._splitting:
            pieces = change(pieces, step)
        plain_P = tf.where(pieces.ids < 0, pieces.texts, "")
        points = tf.strings.unicode_decode(plain_P, "UTF-8")
        points_N, piece_N = points.flat_values, tf.cast(points.value_rowids(), "int32")
        words_N = _numbered(piece_N)
        for cutter in self._cutters:
            words_N = cutter.cut(points_N, words_N)
        ids = self._byte_pairs.encode(points_N, words_N)
        word_count = tf.cast(ids.nrows(), "int32")
        piece_W = tf.math.unsorted_segment_max(piece_N, words_N, word_count)
        by_piece = tf.gather(piece_W, tf.cast(ids.value_rowids(), "int32"))
        return pieces, tf.RaggedTensor.from_value_rowids(
            ids.flat_values, by_piece, nrows=tf.size(pieces.texts), validate=False
        )


def _numbered(piece_N: Any) -> Any:
    """Returns the numbers of pieces without gaps."""
    changes = tf.cast(piece_N[1:] != piece_N[:-1], "int32")
    return tf.concat([tf.zeros_like(piece_N[:1]), tf.cumsum(changes)], 0)


def _with_tables(step: Change) -> Change:
    return Compose(_inert_characters()) if isinstance(step, Compose) else step


@cache
def _inert_characters() -> tuple[str, ...]:
    """Returns the characters that only TensorFlow's tables know how to compose or to order.

    The library `tokenizers` has older ones: to it they are letters that stay as they are.
    """
    import tensorflow_text

    def differing(form: str, before: str, theirs: Any) -> list[tuple[str, str]]:
        found = []
        for text in all_characters():
            given = "\n".join(before + x for x in text.replace("\n", ""))
            result = tensorflow_text.normalize_utf8(given, form).numpy().decode()
            parts = (x.split("\n") for x in (given, result, theirs.normalize_str(given)))
            found += [(x[-1], new) for x, new, old in zip(*parts, strict=True) if new != old]
        return found

    moved = differing("NFC", "x\u0345", tokenizers.normalizers.NFC())
    parted = differing("NFD", "", tokenizers.normalizers.NFD())
    inert = {character for character, _ in [*moved, *parted]}
    return tuple(sorted(inert | {parts[0] for _, parts in parted}))


class _SentencePiece(tf.Module):
    def __init__(self, engine: SentencePieceEngine, parse_special: bool) -> None:
        import tensorflow_text

        super().__init__()
        added: Mapping[str, tuple[tokenizers.AddedToken, int]] = engine.added
        read = [
            (text, token, i)
            for text, (token, i) in added.items()
            if parse_special or not token.special
        ]
        self._splitters = [
            Splitter(make_splitting((x for x in read if x[1].normalized == normalized), True))
            for normalized in (False, True)
        ]
        self._model = tensorflow_text.SentencepieceTokenizer(engine.proto, out_type=tf.int32)

    def encode(self, pieces: Pieces) -> tuple[Pieces, Any]:
        """Returns the pieces, and a row of ids for each; an empty one for an added token."""
        for splitter in self._splitters:
            pieces = splitter.split(pieces)
        text_P = tf.where(pieces.ids < 0, pieces.texts, "")
        return pieces, self._model.tokenize(text_P)
