"""A sentencepiece model as a tokenizer of the library `tokenizers`, which cuts text as it does."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

import tokenizers
from tokenizers import decoders, normalizers, pre_tokenizers

from functional_llm.tokenizers.engines import SPACE
from functional_llm.tokenizers.sentencepiece_model import (
    CONTROL,
    NORMAL,
    USER_DEFINED,
    ModelFacts,
    read_model_facts,
)

# Where a space is put before text: before the text, before each part between added tokens, or not;
# never where there is one already.
PrependScheme = Literal["first", "always", "never"]


def convert_sentencepiece(
    proto: bytes,
    added: Mapping[str, tuple[tokenizers.AddedToken, int]],
    scheme: PrependScheme | None = None,
) -> tokenizers.Tokenizer:
    """Returns a tokenizer that cuts text as a sentencepiece model does.

    Args:
        proto: The model in its own format.
        added: Tokens that text is split at, beside the control symbols of the model, and their ids.
            One with the id of a piece takes its place.
        scheme: To put spaces in front as Transformers' LlamaTokenizer does, which changes nothing
            else in a text. By default all is as in the model itself, part by part.

    Raises:
        ValueError: If the model is of an unknown kind, or there are ids without tokens.
    """
    facts = read_model_facts(proto)
    ids = {token_id: text for text, (_, token_id) in added.items()}
    pieces = [(ids.get(i, x), score, kind) for i, (x, score, kind) in enumerate(facts.pieces)]
    facts = replace(facts, pieces=pieces)
    tokenizer = tokenizers.Tokenizer(_make_model(facts))
    adds_space = facts.adds_space if scheme is None else scheme != "never"
    if scheme is None:
        tokenizer.normalizer = _make_normalizer(facts)
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, scheme, split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
        + ([decoders.Strip(" ", 1, 0)] if adds_space else [])
    )
    own = [
        tokenizers.AddedToken(piece, special=kind != USER_DEFINED, normalized=False)
        for piece, _, kind in facts.pieces
        if kind in (CONTROL, USER_DEFINED)
    ]
    tokenizer.add_tokens(own)
    tokenizer.add_tokens([_special(facts.pieces[facts.unknown][0])])
    ordered = sorted(added.values(), key=lambda pair: pair[1])
    for token, _ in ordered:
        tokenizer.add_tokens([_found_in_text(token)])
    for token, token_id in ordered:
        if tokenizer.token_to_id(token.content) != token_id:
            raise ValueError(
                f"The tokenizer cannot be written as a tokenizer.json. Expected: a token for each "
                f"id up to {token_id}. Received: none before {token.content!r}. Give the ids "
                "between names in added_tokens.json."
            )
    return tokenizer


def _make_model(facts: ModelFacts) -> tokenizers.models.Model:
    if facts.kind == "unigram":
        vocabulary = [(piece, score) for piece, score, _ in facts.pieces]
        return tokenizers.models.Unigram(vocabulary, facts.unknown, facts.byte_fallback)
    return tokenizers.models.BPE(
        {piece: i for i, (piece, _, _) in enumerate(facts.pieces)},
        _merges(facts),
        unk_token=facts.pieces[facts.unknown][0],
        fuse_unk=True,
        byte_fallback=facts.byte_fallback,
    )


def _merges(facts: ModelFacts) -> list[tuple[str, str]]:
    """Returns the merges that make each piece, those of the likeliest piece first."""
    ranks = {
        piece: (-score, i) for i, (piece, score, kind) in enumerate(facts.pieces) if kind == NORMAL
    }
    merges = [
        (rank, place, piece)
        for piece, rank in ranks.items()
        for place in range(1, len(piece))
        if piece[:place] in ranks and piece[place:] in ranks
    ]
    return [(piece[:place], piece[place:]) for _, place, piece in sorted(merges)]


def _make_normalizer(facts: ModelFacts) -> normalizers.Normalizer:
    steps: list[normalizers.Normalizer] = []
    if facts.charsmap:
        steps.append(normalizers.Precompiled(facts.charsmap))
    if facts.removes_spaces:
        steps += [
            normalizers.Strip(),
            normalizers.Replace(tokenizers.Regex(" {2,}"), " "),
        ]
    if facts.adds_space:
        steps.append(normalizers.Prepend(SPACE))
    return normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])


def _found_in_text(token: tokenizers.AddedToken) -> tokenizers.AddedToken:
    """Returns a token that is looked for in the text as it is, not in the normalised one."""
    flags = {name: getattr(token, name) for name in ("single_word", "lstrip", "rstrip", "special")}
    return tokenizers.AddedToken(token.content, **flags, normalized=False)


def _special(text: str) -> tokenizers.AddedToken:
    return tokenizers.AddedToken(text, special=True, normalized=False)
