"""Words in a graph: text is changed, cut by expressions, and made of byte pairs.

Shapes: P pieces, N characters, W words, U different words, M symbols.
"""

from typing import Any

import tensorflow as tf

from functional_llm.tokenizers.in_graph.patterns import Cut
from functional_llm.tokenizers.in_graph.ragged import CUT, Pieces, string_table
from functional_llm.tokenizers.in_graph.steps import (
    BytePairs,
    Change,
    Compose,
    Prefix,
    ReplaceText,
)

_CUT = "\x7f"  # among symbols


def change(pieces: Pieces, step: Change) -> Pieces:
    """Returns the pieces with a step done to those that are text."""
    old_P = pieces.texts
    match step:
        case ReplaceText(old, new):
            escaped = "".join(rf"\x{{{ord(x):x}}}" for x in old)
            new_P = tf.strings.regex_replace(old_P, escaped, new.replace("\\", "\\\\"))
        case Prefix(text, unless, only_first):
            is_in = old_P != ""
            if unless is not None:
                is_in &= tf.strings.substr(old_P, 0, len(unless.encode())) != unless
            if only_first:
                is_in &= pieces.begins
            new_P = tf.where(is_in, tf.strings.join([tf.fill(tf.shape(old_P), text), old_P]), old_P)
        case Compose(inert):
            new_P = _compose(old_P, inert)
    return pieces._replace(texts=tf.where(pieces.ids < 0, new_P, old_P))


def _compose(texts_P: Any, inert: tuple[str, ...]) -> Any:
    import tensorflow_text

    if inert:
        pattern = "([" + "".join(rf"\x{{{ord(x):x}}}" for x in inert) + "])"
        texts_P = tf.strings.regex_replace(texts_P, pattern, CUT + rb"\1" + CUT)
    parts = tf.strings.split(texts_P, CUT)
    parts = parts.with_flat_values(tensorflow_text.normalize_utf8(parts.flat_values, "NFC"))
    return tf.strings.reduce_join(parts, axis=1)


class Cutter(tf.Module):
    """Cuts text into words by an expression.

    Args:
        cut: The compiled expression.
    """

    def __init__(self, cut: Cut) -> None:
        super().__init__()
        self._pattern = f"({cut.pattern})"
        self._classes = tf.constant(cut.classes)
        self._bits = [tf.constant(bits, tf.int32) for bits in cut.next_bits]

    def cut(self, points_N: Any, words_N: Any) -> Any:
        """Returns the word of each character, numbered from 0, inside the words of before."""
        classes_N = tf.gather(self._classes, points_N)
        symbols_N = classes_N
        if self._bits:
            end = tf.size(self._bits[0]) - 1
            goes_on = tf.concat([words_N[1:] == words_N[:-1], tf.zeros_like(words_N[:1]) > 0], 0)
            next_N = tf.where(goes_on, tf.concat([classes_N[1:], classes_N[:1]], 0), end)
            bits = sum(tf.gather(bits, next_N) * 2**i for i, bits in enumerate(self._bits))
            symbols_N = classes_N * 2 ** len(self._bits) + bits
        text_W = tf.strings.unicode_encode(_ragged(symbols_N + 1, words_N), "UTF-8")
        text_W = tf.strings.regex_replace(text_W, self._pattern, rf"{_CUT}\1{_CUT}")
        lengths = tf.strings.length(tf.strings.split(text_W, _CUT).flat_values)
        lengths = tf.boolean_mask(lengths, lengths > 0)
        return tf.repeat(tf.range(tf.size(lengths)), lengths)


def _ragged(values: Any, rows: Any) -> Any:
    return tf.RaggedTensor.from_value_rowids(values, tf.cast(rows, "int64"))


class BytePairEncoder(tf.Module):
    """Makes tokens of words: of all pairs the one that was merged first, until there is none.

    Args:
        byte_pairs: The vocabulary.
    """

    def __init__(self, byte_pairs: BytePairs) -> None:
        super().__init__()
        self._facts = byte_pairs
        self._base = int(byte_pairs.merges.max(initial=0)) + 1
        self._never = len(byte_pairs.merges)
        ranks = {}  # of a pair that is there twice, the last one counts
        for rank, (first, second, _) in enumerate(byte_pairs.merges.tolist()):
            ranks[first * self._base + second] = rank
        initializer = tf.lookup.KeyValueTensorInitializer(
            tf.constant(list(ranks), tf.int64), tf.constant(list(ranks.values()), tf.int32)
        )
        self._ranks = tf.lookup.StaticHashTable(initializer, self._never)
        self._merged = tf.constant([*byte_pairs.merges[:, 2].tolist(), 0], tf.int32)
        self._byte_ids = tf.constant(byte_pairs.byte_ids)
        tokens, words = byte_pairs.tokens, byte_pairs.words
        if tokens:
            self._tokens = string_table([x.encode() for x in tokens], list(tokens.values()))
        if words:
            self._words = string_table(list(words), list(words.values()))

    def encode(self, points_N: Any, words_N: Any) -> Any:
        """Returns the ids of each word, as a ragged tensor."""
        text_W = tf.strings.unicode_encode(_ragged(points_N, words_N), "UTF-8")
        text_U, place_W = tf.unique(text_W)
        return tf.gather(self._encode_words(text_U), place_W)

    def _encode_words(self, text_U: Any) -> Any:
        ids_M, word_M = self._symbols(text_U)
        count = tf.size(text_U)
        known_U = None
        if self._facts.words:
            known_U = self._words.lookup(text_U)
            pieces = tf.gather(known_U, word_M) < 0
            ids_M, word_M = tf.boolean_mask(ids_M, pieces), tf.boolean_mask(word_M, pieces)
        ids_M, word_M = self._merge(ids_M, word_M, count)
        if known_U is not None:
            whole = tf.cast(tf.where(known_U >= 0)[:, 0], "int32")
            ids_M = tf.concat([ids_M, tf.gather(known_U, whole)], 0)
            word_M = tf.concat([word_M, whole], 0)
            order = tf.argsort(word_M, stable=True)
            ids_M, word_M = tf.gather(ids_M, order), tf.gather(word_M, order)
        return tf.RaggedTensor.from_value_rowids(ids_M, word_M, nrows=count, validate=False)

    def _symbols(self, text_U: Any) -> tuple[Any, Any]:
        """Returns the ids by which words begin, and the word of each."""
        facts = self._facts
        if facts.tokens:
            characters = tf.strings.unicode_split(text_U, "UTF-8")
            word_C = tf.cast(characters.value_rowids(), "int32")
            known_C = self._tokens.lookup(characters.flat_values)
            text_C = characters.flat_values
        else:  # a word is a row of bytes
            word_C, text_C = tf.range(tf.size(text_U)), text_U
            known_C = tf.fill(tf.shape(text_U), -1)
        split = tf.strings.bytes_split(text_C)
        place_M = tf.cast(split.value_rowids(), "int32")
        byte_M = tf.cast(tf.reshape(tf.io.decode_raw(split.flat_values, tf.uint8), [-1]), "int32")
        known_M = tf.gather(known_C, place_M)
        ids_M = tf.where(known_M >= 0, known_M, tf.gather(self._byte_ids, byte_M))
        is_first = tf.range(tf.size(place_M)) == tf.gather(
            tf.cast(split.row_starts(), "int32"), place_M
        )
        whole_M = (known_M >= 0) | (facts.byte_ids[0] < 0 if facts.tokens else False)
        kept = is_first | ~whole_M
        ids_M, word_M = ids_M, tf.gather(word_C, place_M)
        ids_M, word_M = tf.boolean_mask(ids_M, kept), tf.boolean_mask(word_M, kept)
        return self._with_unknown(ids_M, word_M)

    def _with_unknown(self, ids_M: Any, word_M: Any) -> tuple[Any, Any]:
        unknown, kept = self._facts.unknown, ids_M >= 0
        if unknown is not None:
            edge = tf.zeros_like(kept[:1])
            after = tf.concat([edge, ~kept[:-1] & (word_M[1:] == word_M[:-1])], 0)
            fused = after if self._facts.fuses_unknown else tf.zeros_like(kept)
            ids_M, kept = tf.where(kept, ids_M, unknown), kept | ~fused
        return tf.boolean_mask(ids_M, kept), tf.boolean_mask(word_M, kept)

    def _merge(self, ids_M: Any, word_M: Any, count: Any) -> tuple[Any, Any]:
        def step(ids: Any, words: Any, _: Any) -> tuple[Any, Any, Any]:
            pairs = tf.cast(ids[:-1], "int64") * self._base + tf.cast(ids[1:], "int64")
            ranks = tf.where(words[:-1] == words[1:], self._ranks.lookup(pairs), self._never)
            best = tf.math.unsorted_segment_min(ranks, words[:-1], count)
            is_best = (ranks == tf.gather(best, words[:-1])) & (ranks < self._never)
            places = tf.range(tf.size(ranks))
            far = tf.size(ids)
            first = tf.where(is_best, places, far)
            first = tf.math.unsorted_segment_min(first, words[:-1], count)
            first = tf.boolean_mask(first, (first >= 0) & (first < far))
            merged = tf.gather(self._merged, tf.gather(ranks, first))
            ids = tf.tensor_scatter_nd_update(ids, first[:, None], merged)
            kept = tf.tensor_scatter_nd_update(
                tf.ones_like(ids, tf.bool), first[:, None] + 1, tf.zeros_like(first, tf.bool)
            )
            ids, words = tf.boolean_mask(ids, kept), tf.boolean_mask(words, kept)
            return ids, words, tf.size(first) > 0

        free = tf.TensorShape([None])
        ids, words, _ = tf.while_loop(
            lambda ids, words, goes_on: goes_on,
            step,
            (ids_M, word_M, tf.size(ids_M) > 1),
            shape_invariants=(free, free, tf.TensorShape([])),
        )
        return ids, words
