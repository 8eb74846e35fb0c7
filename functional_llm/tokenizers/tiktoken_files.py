"""`tiktoken.model`: the byte-pair vocabulary that Kimi K2 and Moonlight were published with.

A line is a token in base64, and its id, which is its rank: the pair whose token has the lowest rank
is merged first. How text is cut, the class in the repositories says.
Reference: https://huggingface.co/moonshotai/Kimi-K2-Instruct, `tokenization_kimi.py`.
"""

import base64
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import tokenizers

from functional_llm.tokenizers.byte_pairs import byte_pair_engine
from functional_llm.tokenizers.engines import BYTE_ALPHABET
from functional_llm.tokenizers.pretokenizers import PRE_TOKENIZERS

CLASS, FILE_NAME = "TikTokenTokenizer", "tiktoken.model"
_RESERVED = 258  # ids behind the vocabulary, of which tokenizer_config.json describes some
_LETTERS = {byte: letter for letter, byte in BYTE_ALPHABET.items()}


def read_tiktoken(path: Path, ids: Mapping[str, int]) -> tokenizers.Tokenizer:
    """Returns the tokenizer of a file, with a special token for each id that is reserved.

    Args:
        path: The file.
        ids: Of the tokens that the files beside it describe.

    Raises:
        ValueError: If it is malformed.
    """
    ranks: dict[bytes, int] = {}
    try:
        for line in path.read_bytes().splitlines():
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        if sorted(ranks.values()) != list(range(len(ranks))):
            raise ValueError("ids with gaps between them")
        vocabulary = {_text(token): rank for token, rank in ranks.items()}
        names = {token_id: text for text, token_id in ids.items()}
        behind = range(len(ranks), len(ranks) + _RESERVED)
        reserved = [
            tokenizers.AddedToken(names.get(i, f"<|reserved_token_{i}|>"), special=True)
            for i in behind
        ]
        pre = replace(PRE_TOKENIZERS["kimi-k2"], ignore_merges=True)
        return byte_pair_engine(vocabulary, _merges(ranks), reserved, pre).tokenizer
    except ValueError as error:
        raise ValueError(
            f"{path} is malformed. Expected: lines of a token in base64 and its id, from 0 on. "
            f"Received: {error}. Fetch the file again."
        ) from error


def _merges(ranks: Mapping[bytes, int]) -> list[tuple[str, str]]:
    """Returns all pairs of tokens that make a token, the lowest rank first."""
    pairs = []
    for token in sorted(ranks, key=ranks.__getitem__):
        halves = ((token[:i], token[i:]) for i in range(1, len(token)))
        known = [(a, b) for a, b in halves if a in ranks and b in ranks]
        pairs += sorted(known, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
    return [(_text(a), _text(b)) for a, b in pairs]


def _text(token: bytes) -> str:
    return "".join(map(_LETTERS.__getitem__, token))
