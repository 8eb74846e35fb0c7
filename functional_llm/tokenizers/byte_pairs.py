"""Byte-pair vocabularies of files that hold tokens and merges, but no tokenizer.json."""

from collections.abc import Mapping, Sequence
from typing import Any

import tokenizers

from functional_llm.tokenizers.engines import SPACE, TokenizersEngine
from functional_llm.tokenizers.pretokenizers import PreTokenizer


def byte_pair_engine(
    vocabulary: Mapping[str, int],
    merges: Sequence[tuple[str, str]],
    added: Sequence[tokenizers.AddedToken],
    pre: PreTokenizer,
) -> TokenizersEngine:
    """Returns the engine of a byte-pair vocabulary.

    Args:
        vocabulary: Token -> id.
        merges: Pairs of tokens, the first to be merged first.
        added: Tokens of the vocabulary that text is split at.
        pre: How text is cut into words.

    Raises:
        ValueError: If a merge is not of tokens into a token.
    """
    try:
        model = tokenizers.models.BPE(
            dict(vocabulary),
            list(merges),
            ignore_merges=pre.ignore_merges,
            byte_fallback=not pre.byte_level,
        )
    # The library raises no narrower class.
    except Exception as error:
        raise ValueError(str(error)) from error
    tokenizer = tokenizers.Tokenizer(model)
    words: list[Any] = [
        tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
        for pattern in pre.patterns
    ]
    if pre.byte_level:
        words.append(tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
        tokenizer.decoder = tokenizers.decoders.ByteLevel()
    else:
        tokenizer.normalizer = tokenizers.normalizers.Replace(" ", SPACE)
        tokenizer.decoder = tokenizers.decoders.Sequence(
            [tokenizers.decoders.Replace(SPACE, " "), tokenizers.decoders.ByteFallback()]
        )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(words)
    tokenizer.add_tokens(list(added))
    return TokenizersEngine(tokenizer)
