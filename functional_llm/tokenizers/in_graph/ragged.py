"""Pieces of texts in a graph, flat: a vector of strings, and the text that each belongs to.

Shapes: B texts, P pieces, N characters.
"""

from typing import Any, NamedTuple

import tensorflow as tf

from functional_llm.tokenizers.in_graph.added import Splitting

CUT = b"\xff"  # stands between pieces: no text in UTF-8 has this byte
_SPACES = r"[\t-\r \x{85}\x{a0}\x{1680}\x{2000}-\x{200a}\x{2028}\x{2029}\x{202f}\x{205f}\x{3000}]"


class Pieces(NamedTuple):
    """Pieces of texts, in their order.

    Args:
        texts: Strings.
        rows: The text that each belongs to.
        ids: The id of an added token; -1 for text, which has no id yet.
        begins: Whether a piece stands where its text begins.
    """

    texts: Any
    rows: Any
    ids: Any
    begins: Any

    def where(self, mask_P: Any) -> "Pieces":
        vectors = (tf.ensure_shape(x, [None]) for x in self)  # some operations forget it
        return Pieces(*(tf.boolean_mask(x, tf.ensure_shape(mask_P, [None])) for x in vectors))


def as_pieces(texts_B: Any) -> Pieces:
    """Returns whole texts as pieces; one that is no UTF-8 is an error of TensorFlow's."""
    texts_B = tf.strings.unicode_transcode(texts_B, "UTF-8", "UTF-8", errors="strict")
    count = tf.size(texts_B)
    pieces = Pieces(texts_B, tf.range(count), tf.fill([count], -1), tf.ones_like(texts_B, tf.bool))
    return pieces.where(texts_B != "")


class Splitter(tf.Module):
    """Splits pieces at added tokens, as the library `tokenizers` does.

    Args:
        splitting: The tokens.
    """

    def __init__(self, splitting: Splitting) -> None:
        super().__init__()
        self._splitting = splitting
        if splitting.pattern:
            texts = [text.encode() for text in splitting.ids]
            self._ids = string_table(texts, list(splitting.ids.values()))

    def split(self, pieces: Pieces) -> Pieces:
        """Returns the pieces of all texts; those that are tokens already stay."""
        if not self._splitting.pattern:
            return pieces
        marked_P = tf.strings.regex_replace(
            pieces.texts, f"({self._splitting.pattern})", CUT + rb"\1" + CUT
        )
        marked_P = tf.where(pieces.ids < 0, marked_P, pieces.texts)
        split = tf.strings.split(marked_P, CUT)
        place = tf.cast(split.value_rowids(), "int32")
        starts = tf.cast(tf.gather(split.row_starts(), place), "int32")
        is_first = tf.range(tf.size(place)) == starts
        is_token = (tf.range(tf.size(place)) - starts) % 2 == 1  # they alternate
        ids = tf.where(is_token, self._ids.lookup(split.flat_values), -1)
        ids = tf.where(tf.gather(pieces.ids, place) < 0, ids, tf.gather(pieces.ids, place))
        found = Pieces(
            split.flat_values,
            tf.gather(pieces.rows, place),
            ids,
            is_first & tf.gather(pieces.begins, place),
        )
        found = self._joined(found, is_first)
        return found.where((found.texts != "") | (found.ids >= 0))

    def _joined(self, found: Pieces, is_first: Any) -> Pieces:
        """Joins what was found but stays text with the text around it; then tokens eat spaces."""
        kept = found.ids >= 0
        if -1 in self._splitting.ids.values():
            after_kept = tf.concat([[False], kept[:-1]], 0)
            group = tf.cumsum(tf.cast(is_first | kept | after_kept, "int32")) - 1
            count = tf.reduce_max(tf.concat([group, [-1]], 0)) + 1
            texts = tf.strings.unsorted_segment_join(found.texts, group, count)
            rows = tf.math.unsorted_segment_max(found.rows, group, count)
            ids = tf.math.unsorted_segment_max(found.ids, group, count)
            begins = tf.math.unsorted_segment_max(tf.cast(found.begins, "int32"), group, count)
            found = Pieces(texts, rows, ids, begins > 0)
        for tokens, shift, pattern in (
            (self._splitting.eats_before, 1, f"{_SPACES}+$"),
            (self._splitting.eats_after, -1, f"^{_SPACES}+"),
        ):
            if tokens:
                eats = self._is_one_of(found, tokens)
                edge = tf.zeros_like(eats[:1])
                eats = tf.concat([eats[1:], edge] if shift == 1 else [edge, eats[:-1]], 0)
                same = _same_neighbour(found.rows, shift) & (found.ids < 0)
                stripped = tf.strings.regex_replace(found.texts, pattern, "")
                found = found._replace(texts=tf.where(eats & same, stripped, found.texts))
        return found

    def _is_one_of(self, found: Pieces, tokens: frozenset[str]) -> Any:
        equal = [found.texts == text for text in sorted(tokens)]
        return tf.reduce_any(tf.stack(equal), axis=0) & (found.ids >= 0)


def _same_neighbour(rows: Any, shift: int) -> Any:
    same, edge = rows[1:] == rows[:-1], tf.zeros_like(rows[:1], tf.bool)
    return tf.concat([same, edge] if shift == 1 else [edge, same], 0)


def string_table(keys: list[bytes], values: list[int]) -> Any:
    """Returns a table from strings to int32, -1 for others."""
    initializer = tf.lookup.KeyValueTensorInitializer(
        tf.constant(keys, tf.string), tf.constant(values, tf.int32)
    )
    return tf.lookup.StaticHashTable(initializer, -1)
